"""Private: how attention is found in a graph."""
