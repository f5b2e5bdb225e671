"""How a graph's reference branch is copied."""
