"""One file per question, over shared workloads; ``python -m benchmarks`` asks the main ones.

Each runs alone, such as ``python -m benchmarks.overhead``.
"""
