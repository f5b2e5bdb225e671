"""What is measured on a GPU when there is one for some minutes."""
