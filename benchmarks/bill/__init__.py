"""What a whole training pays for being watched: 20 steps in fresh processes, by variant and model.

``benchmarks.compilation`` runs it. Files are imported before the clock starts, so they import torch
and nothing that imports its compiler; what a variant needs is imported when it is attached.
"""
