"""Reductions of tensors to rows of partial sums: on a CPU, on a GPU, and in plain torch."""
