"""Private: what passes know of graphs, and how they edit them."""
