"""Which files of tests take longest, for workers to begin with.

What is out of date here costs time, and nothing else. `.ci/budget.py` prints the longest files of a
run in the form of this list.
"""

from __future__ import annotations

from pathlib import Path

LONGEST = (
    "test_fused",
    "test_parallel_reference",
    "test_documentation",
    "test_partition",
    "test_truth",
    "test_attention",
    "test_tensor_parallel",
    "test_reference",
    "test_sharded_reference",
    "test_undisturbed",
    "test_vector_widths",
    "test_program_choice",
    "test_mesh_trainings",
    "test_module_monitor",
    "test_samples",
    "test_distributed",
    "test_activation_gradients",
    "test_kernel_resources",
    "test_outputs",
    "test_host",
    "test_ways",
    "test_train_example",
    "test_unusual_models",
    "test_group",
    "test_sinks",
    "test_pipeline",
    "test_report",
    "test_pair_kernels",
    "test_plan_accounts",
    "test_gpu_plans",
    "test_coordinate_check",
    "test_reference_state",
    "test_hostile_files",
    "test_cuda_graph_sequences",
    "test_reference_reads",
    "test_forward_passes",
    "test_integration_torchtnt",
    "test_gpu_report",
    "test_integration_lightning",
    "test_integration_transformers",
    "test_terminal",
)


def place(path: Path) -> int:
    """Where a file stands in the list, the others after all of it."""
    name = path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)
