"""Private: tensors become rows of partial sums: on a CPU, on a GPU, and in plain torch."""
