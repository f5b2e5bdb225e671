"""What Inductor plans for a GPU: captured from real graphs, accounted, and assembled."""
