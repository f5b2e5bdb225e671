"""How attention is found in a graph."""
