"""Private: statistics of tensors, one implementation per kind of machine."""
