"""Faults that the tests must catch: see ``tests/deliberate_faults.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault: ``faulty`` in the place of ``sound``, which stands in ``file`` exactly once.

    ``tests`` are the files, or single tests, that are to catch it.
    """

    name: str
    file: str
    sound: str
    faulty: str
    tests: tuple[str, ...]


FAULTS = (
    # Numbers
    Fault(
        "columns_in_another_order",
        "tmm/kernels/summarize/host_operator.cpp",
        '"minimum",\n    "maximum",',
        '"maximum",\n    "minimum",',
        ("tests/test_host.py",),
    ),
    Fault(
        "moment_of_means_left_out",
        "tmm/kernels/summarize/host.cpp",
        "left.moment2 += right.moment2 + square * cross;",
        "left.moment2 += right.moment2;",
        ("tests/test_host.py",),
    ),
    Fault(
        "nan_counted_as_zero",
        "tmm/kernels/summarize/host.cpp",
        "zeros += value == 0 ? 1.0 : 0.0;",
        "zeros += value < 0 || value > 0 ? 0.0 : 1.0;",
        ("tests/test_host.py",),
    ),
    Fault(
        "statistic_of_another_column",
        "tmm/kernels/summarize/torch_rows.py",
        '"sum_absolute": lambda: total(values.abs()),',
        '"sum_absolute": lambda: total(values),',
        ("tests/test_kernels.py",),
    ),
    Fault(
        "std_of_a_population",
        "tmm/core/metrics.py",
        'columns["moment2"] / (columns["count"] - 1)  # 0/0',
        'columns["moment2"] / columns["count"]  # 0/0',
        ("tests/test_metrics.py",),
    ),
    Fault(
        "micro_batches_averaged",
        "runtime/partials.py",
        "same.setdefault(sites, []).append(rows)",
        "same.setdefault(sites, []).append(rows * (same[sites][0][:, :1] / rows[:, :1]))",
        ("tests/test_truth.py::test_micro_batches_of_different_sizes_are_joined",),
    ),
    Fault(
        "nan_of_a_rank_forgotten",
        "tmm/core/merging.py",
        "columns[name] = np.where(columns[name] > 0, np.nan, values)",
        "columns[name] = values",
        ("tests/test_joined_rows.py",),
    ),
    Fault(
        "rank_counted_twice",
        "runtime/ranks/protocol.py",
        "total = self._collectives.total(sums(own, largest))",
        "total = self._collectives.total(sums(own, largest)) + sums(own, largest)",
        ("tests/test_cross_rank.py",),
    ),
    Fault(
        "key_collision_joined",
        "runtime/key_owners.py",
        "if known != owner:",
        "if known is None:",
        ("tests/test_key_owners.py",),
    ),
    # Attention
    Fault(
        "attention_heads_swapped",
        "tmm/kernels/attention/attention_host.cpp",
        "std::memcpy(call.result + head *",
        "std::memcpy(call.result + (call.heads - 1 - head) *",
        ("tests/test_attention_kernels.py",),
    ),
    Fault(
        "attention_mask_ignored",
        "passes/attention/find_calls.py",
        "masks = (Mask.of(mask),) if isinstance(mask, Node) else ()\n    query, key, value = (",
        "masks: tuple[Mask, ...] = ()\n    query, key, value = (",
        ("tests/test_attention.py::test_forms_of_a_call",),
    ),
    # Forward and backward passes
    Fault(
        "repetition_of_a_checkpoint_counted",
        "tmm/instrumentation/twin.py",
        "discarding, self._discarding = self._discarding, True",
        "discarding, self._discarding = self._discarding, False",
        ("tests/test_unusual_models.py::test_recomputed_blocks_count_once",),
    ),
    Fault(
        "repetition_of_an_outside_call_counted",
        "tmm/instrumentation/twin.py",
        "current_graph_task_id() == -1  # no repetition",
        "current_graph_task_id() >= -1  # no repetition",
        ("tests/test_outside_calls.py",),
    ),
    Fault(
        "evaluation_counted_as_training",
        "tmm/steps/forward_passes.py",
        "apart = frozenset(passes) - counted",
        "apart = frozenset[ForwardPass]()",
        ("tests/test_forward_passes.py",),
    ),
    Fault(
        "probe_cuts_a_gradient",
        "passes/insert_gradient_probes.py",
        "    if not is_grad_enabled:\n        place.refusal",
        "    if example is None:\n        place.refusal",
        ("tests/test_activation_gradients.py",),
    ),
    Fault(
        "graph_break_in_the_monitored_program",
        "tmm/instrumentation/outputs.py",
        "    for path, tensor in tensors_in(output):\n        if tensor.requires_grad and",
        "    torch._dynamo.graph_break()\n"
        "    for path, tensor in tensors_in(output):\n        if tensor.requires_grad and",
        ("tests/test_undisturbed.py::test_each_program_compiles_once",),
    ),
    Fault(
        "random_state_advanced",
        "runtime/eager_functions.py",
        "        state.restore()  # the training's random numbers are not the metric's",
        "        pass",
        ("tests/test_module_monitor.py::test_metrics_leave_the_random_numbers_alone",),
    ),
    Fault(
        "hook_left_behind",
        "tmm/steps/watched_optimizer.py",
        "        self._before.remove()\n        self._after.remove()",
        "        self._before.remove()",
        ("tests/test_parameters.py::test_removing_takes_the_hooks_off",),
    ),
    # References
    Fault(
        "reference_shares_memory",
        "tmm/spec/reference.py",
        "kept = tensor.to(device, wanted, copy=copies)",
        "kept = tensor.to(device, wanted)",
        ("tests/test_reference_state.py",),
    ),
    Fault(
        "reference_with_a_dropout_of_its_own",
        "passes/graph/dropout_functions.py",
        "    if mask.dtype != torch.bool:\n"
        "        return input * mask\n"
        "    return input * mask * (1 / (1 - p) if p < 1 else 0.0)\n",
        "    return functional.dropout(input, p, True)\n",
        ("tests/test_reference.py",),
    ),
    Fault(
        "reference_from_another_random_state",
        "tmm/instrumentation/reference/eager_comparison.py",
        "        state = RandomState.capture()\n",
        "        state = RandomState.capture()\n        torch.rand(())\n",
        ("tests/test_reference.py::test_ways",),
    ),
    # Optimizers
    Fault(
        "gradient_unscaled_twice",
        "tmm/steps/optimizers.py",
        'if state is not None and state["stage"] is not OptState.READY:',
        'if state is not None and state["stage"] is OptState.STEPPED:',
        ("tests/test_parameters.py",),
    ),
    Fault(
        "update_relative_to_weights_after_it",
        "tmm/steps/parameters.py",
        "measure(now, reference=before, choose=_reads_both)",
        "measure(before, reference=now, choose=_reads_both)",
        ("tests/test_parameters.py::test_updates_equal_differences_of_copies",),
    ),
    Fault(
        "nested_step_counted_twice",
        "tmm/steps/nested_optimizers.py",
        "return self.place == 0",
        "return True",
        ("tests/test_nested_optimizers.py",),
    ),
    # Runs
    Fault(
        "step_number_off_by_one",
        "tmm/runs/live.py",
        "self._advance(self.current_step + 1)",
        "self._advance(self.current_step + 2)",
        ("tests/test_runs.py",),
    ),
    Fault(
        "last_step_lost_by_the_run",
        "tmm/runs/live.py",
        "if self._timeline.is_of_run:\n                    self._end_step(",
        "if not self._timeline.is_of_run:\n                    self._end_step(",
        ("tests/test_runs.py", "tests/test_steps_machine.py"),
    ),
    Fault(
        "last_step_lost_by_the_writer",
        "runtime/store/run_writer.py",
        "            if not self._waiting:\n                return None\n",
        "            if not self._waiting or self.ended:\n                return None\n",
        ("tests/test_writer.py",),
    ),
    Fault(
        "lock_not_released",
        "tmm/runs/held.py",
        "            finally:\n                self._lock.release()\n",
        "            finally:\n                pass\n",
        ("tests/test_runs.py::test_a_run_goes_on",),
    ),
    Fault(
        "resume_overwrites_earlier_steps",
        "tmm/runs/live.py",
        "replaces_from=run.first_step if run.repeats_steps else None,",
        "replaces_from=0 if run.repeats_steps else None,",
        ("tests/test_runs.py::test_a_run_goes_back_to_the_step_of_a_checkpoint",),
    ),
    Fault(
        "torn_tail_read_as_data",
        "runtime/store/segment_reader.py",
        'if not 0 < last["file_bytes"] <= size:',
        'if not 0 < last["file_bytes"]:',
        ("tests/test_segment.py",),
    ),
    Fault(
        "late_value_takes_the_place_of_its_step",
        "tmm/steps/timeline.py",
        "ended = self._ended.with_part(collector)\n",
        "ended = EndedStep(collector.step, (collector,))\n",
        ("tests/test_late_values.py",),
    ),
    Fault(
        "step_known_to_a_backend_gets_no_late_values",
        "tmm/sinks/mlflow.py",
        "elif self._known is None or step < self._next_step - 1:",
        "elif self._known is None or step < self._next_step:",
        ("tests/test_sinks.py::test_what_is_added_to_a_step_that_has_ended",),
    ),
    # What users get of them
    Fault(
        "sink_without_the_last_row",
        "tmm/sinks/csv.py",
        "rows = numbers(values, None).items()\n",
        "rows = [*numbers(values, None).items()][:-1]\n",
        ("tests/test_sinks.py::test_it_holds_what_the_run_holds",),
    ),
    Fault(
        "export_with_a_column_shifted",
        "tmm/runs/export.py",
        "pairs = zip(steps.tolist(), values.tolist(), strict=True)",
        "pairs = zip(steps.tolist(), np.roll(values, 1).tolist(), strict=True)",
        ("tests/test_export.py",),
    ),
    Fault(
        "detector_that_never_fires",
        "tmm/analysis/detectors/loss.py",
        "episodes(losses, scores > medium, badness=scores)",
        "episodes(losses, scores > np.inf, badness=scores)",
        ("tests/test_detectors.py",),
    ),
)
