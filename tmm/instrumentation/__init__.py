"""Private: the monitored program beside the user's own: how it is made, chosen and credited."""
