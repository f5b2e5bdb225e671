"""Private: graph in, graph out: the compiler passes.

Each pass is a plain function in a file of its own; ``tmm.passes.pipeline`` runs them in order.
They know graphs and reductions, and no model, file or step.
"""
