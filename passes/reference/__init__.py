"""Private: how a graph's reference branch is copied."""
