"""Private: the reference beside a model, where it is compared outside of graphs."""
