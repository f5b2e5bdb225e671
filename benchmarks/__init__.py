"""One file per question, over shared workloads.

Each runs alone, such as ``python -m benchmarks.overhead``.
"""
