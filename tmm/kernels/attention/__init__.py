"""Private: statistics of attention, one implementation per kind of machine."""
