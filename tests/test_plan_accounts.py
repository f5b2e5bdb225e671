"""What is counted in a plan: texts whose bytes are known, kernels that were split, resources."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.fx.experimental.proxy_tensor import make_fx
from typer.testing import CliRunner

from benchmarks import gpu_plan, mocked_gpu
from benchmarks.mocked_gpu import CHIPS
from benchmarks.plan.account import (
    Buffer,
    Launch,
    Total,
    UnknownSizeError,
    kernels_of,
    kind_of,
    launches_of,
)
from benchmarks.plan.compare import Comparison, Kernel, compare
from benchmarks.plan.identity import identity, name_nodes
from benchmarks.plan.resources import Resources, least, occupancy, read_log
from benchmarks.plan.variants import PLAIN, all_variants
from benchmarks.report import FOLDER_VARIABLE
from benchmarks.workloads import FIVE_METRICS
from tests.interpreters import ROOT
from tests.triton_interpreter import printed_by
from tmm.core.metrics import builtin_reductions

TEXT = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', \'\'\'
def triton_poi_fused_add_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    pass
\'\'\', device_str='cuda')

class Runner:
    def call(self, args):
        primals_1, primals_2, s0 = args
        args.clear()
        primals_2_size = primals_2.size()
        s1 = primals_2_size[1]
        assert_size_stride(primals_1, (10, 4), (4, 1), 'input')
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            primals_1 = copy_if_misaligned(primals_1)
            buf0 = empty_strided_cuda((10, 4), (4, 1), torch.bfloat16)
            raw_stream0 = get_raw_stream(0)
            triton_poi_fused_add_0.run(primals_1, buf0, 40, stream=raw_stream0)
            buf1 = buf0; del buf0  # reuse
            triton_poi_fused_add_0.run(buf1, primals_1, primals_1, 40, stream=raw_stream0)
            buf2 = reinterpret_tensor(buf1, (4, 5), (5, 1), 20); del buf1  # reuse
            extern_kernels.mm(reinterpret_tensor(buf2, (4, 5), (1, 4), 0), primals_2, out=buf2)
            buf3 = torch.ops.aten.attend.default(reinterpret_tensor(primals_1, (10, 1), (4, 1), 0),
                reinterpret_tensor(primals_1, (10, 1), (4, 1), 1), None)
            buf4 = buf3[0]
            torch.ops.tmm.summarize.default(buf4, 'sum')
            buf5 = empty_strided_cuda((s0, s1 + 2*s0), (s1 + 2*s0, 1), torch.float64)
            triton_red_fused_sum_1.run(buf5, s0, stream=raw_stream0)
            workspace_0 = empty_strided_cuda((64, ), (1, ), torch.float32)
            workspace_0.zero_()
            buf6 = workspace_0[0 * (2) * (8) : (0 + 1) * (2) * (8)].view(2, 8).sum(dim=0).view([8]).to(torch.bfloat16)
            buf7 = torch.ops.tmm.pack.default([buf4, buf6, buf4])
        return (buf2, )
"""  # noqa: E501 -- as it is generated
KNOWN = {"buf4": Buffer((3, 3), 4), "buf6": Buffer((8,), 2), "buf7": Buffer((9,), 8)}
INPUTS = [Buffer((10, 4), 2), Buffer((5, 6), 2), 3]


def test_launches_and_bytes_of_a_text_are_counted() -> None:
    found = launches_of(TEXT, KNOWN, INPUTS)
    assert [(one.name, one.kind, one.bytes) for one in found] == [
        ("triton_poi_fused_add_0", "triton", 80 + 80),
        ("triton_poi_fused_add_0", "triton", 80 + 80),  # the argument that is there twice, once
        ("extern_kernels.mm", "library", 40 + 60),  # the same memory in and out
        ("torch.ops.aten.attend", "library", 20 + 20),  # two views, neither of which is the whole
        ("torch.ops.tmm.summarize", "tmm", 36),
        ("triton_red_fused_sum_1", "triton", 3 * (6 + 6) * 8),
        ("zero_", "library", 256),
        ("sum", "library", 16 * 4 + 8 * 2),
        ("to", "library", 8 * 2 + 8 * 2),
        ("torch.ops.tmm.pack", "tmm", 36 + 16),
    ]
    assert Total.of(found) == Total(3, 7, 160 + 160 + 288, 100 + 40 + 36 + 256 + 80 + 32 + 52)


def test_views_of_one_buffer_count_no_more_than_the_whole() -> None:
    text = """
def call(args):
    arg0_1, = args
    extern_kernels.bmm(reinterpret_tensor(arg0_1, (4, 9), (0, 1), 0), arg0_1, out=arg0_1)
"""
    (launch,) = launches_of(text, inputs=[Buffer((9,), 4)])
    assert launch.bytes == 36


def test_what_a_kernel_overwrites_counts_twice() -> None:
    text = """
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''
def triton_poi_fused_0(in_out_ptr0, in_ptr0, xnumel, XBLOCK : tl.constexpr):
    pass
''', device_str='cuda')

def call(args):
    arg0_1, arg1_1, = args
    triton_poi_fused_0.run(arg0_1, arg1_1, 9, stream=stream0)
"""
    (launch,) = launches_of(text, inputs=[Buffer((9,), 4), Buffer((7,), 4)])
    assert launch.bytes == 36 + 36 + 28


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("triton_poi_fused_0.run(buf9, 40, stream=stream0)", "buf9"),
        ("extern_kernels.mm(reinterpret_tensor(buf9, (3, ), (1, ), 0), buf0)", "buf9"),
        ("buf0 = empty_strided_cuda((s7, 3), (3, 1), torch.float32)", "s7"),
        ("torch.ops.tmm.pack.default([buf9])", "buf9"),
    ],
)
def test_no_argument_is_taken_for_nothing(line: str, missing: str) -> None:
    with pytest.raises(UnknownSizeError, match=missing):
        launches_of(f"def call(args):\n    {line}\n")


def test_what_launches_nothing_is_none() -> None:
    for called in ("assert_size_stride", "get_raw_stream", "args.clear", "torch.cuda.set_device"):
        assert kind_of(called) is None
    assert kind_of("aten.index_put_") == kind_of("buf3.copy_") == "library"


def test_kernels_are_found_by_name() -> None:
    (kernel,) = kernels_of(TEXT).items()
    assert kernel[0] == "triton_poi_fused_add_0"
    assert "def triton_poi_fused_add_0(in_ptr0" in kernel[1]


def test_totals_are_added_and_taken_apart() -> None:
    one, two = Total(1, 2, 30, 40), Total(2, 2, 35, 45)
    assert two - one + one == two
    assert ((two - one).launches, (two - one).bytes) == (1, 10)


def kernel(name: str, origins: str, stored: str) -> Kernel:
    return Kernel(name, frozenset(origins), frozenset(stored))


PLAIN_KERNELS = [kernel("norm", "abc", "c"), kernel("gelu", "de", "e"), kernel("fill", "f", "f")]


@pytest.mark.parametrize(
    ("other", "added", "split"),
    [
        (PLAIN_KERNELS, {}, ()),
        # Sums ride along in one, and store what the plain program does not know.
        ([kernel("norm2", "abcxy", "cxy"), *PLAIN_KERNELS[1:]], {}, ()),
        # A tensor is read once more for its sums.
        ([*PLAIN_KERNELS, kernel("read", "x", "x")], {"read": 1}, ()),
        # What was computed inside of a kernel is stored by one of its own.
        (
            [kernel("ab", "abx", "bx"), kernel("c", "c", "c"), *PLAIN_KERNELS[1:]],
            {"ab": 1},
            (("norm", "ab"),),
        ),
        # Two have become one, and one of them reads what the other one stores.
        ([kernel("both", "abcde", "ce"), PLAIN_KERNELS[2]], {}, ()),
        # Recomputed where it is read once more: nothing is stored that was not before.
        ([*PLAIN_KERNELS, kernel("read", "dex", "x")], {"read": 1}, ()),
    ],
)
def test_split_kernels_are_told_from_added_ones(
    other: list[Kernel], added: dict[str, int], split: tuple[tuple[str, str], ...]
) -> None:
    found = compare(PLAIN_KERNELS, other)
    assert isinstance(found, Comparison)
    assert (dict(found.added), found.split) == (added, split)
    assert sum(found.pairs.values()) == len(PLAIN_KERNELS)


def test_an_image_is_the_kernel_that_does_the_same_and_not_one_that_does_more() -> None:
    plain = [kernel("zero", "a", "a"), kernel("put", "ab", "b")]
    other = [kernel("put", "abx", "bx"), kernel("zero", "ax", "ax")]
    assert compare(plain, other).pairs == {("zero", "zero"): 1, ("put", "put"): 1}


def computes(x: torch.Tensor, measure: bool) -> list[torch.Tensor]:
    y = x.sin().view(2, 6).view(12)
    rows = [y.view(3, 4).amax(1)] if measure else []
    z = y.view(12) if measure else y
    return [z.view(2, 6).view(2, 6).cos(), *rows]


def test_a_node_has_one_name_in_two_programs() -> None:
    graphs = [
        make_fx(functools.partial(computes, measure=m))(torch.ones(12)) for m in (False, True)
    ]
    for graph in graphs:
        name_nodes(graph, {})
    names = [
        {str(node.target): identity(node) for node in graph.graph.nodes if node.op != "output"}
        for graph in graphs
    ]
    assert "aten.amax.default" in names[1]
    for target in ("aten.sin.default", "aten.cos.default"):
        assert names[0][target] == names[1][target]
    assert len({*names[0].values()}) == len(names[0])


def test_what_a_node_reads_makes_its_name() -> None:
    graph = make_fx(lambda x, y: (x + y, y + x, x.sum(0), x.sum(1)))(
        torch.ones(2, 2), torch.ones(2, 2)
    )
    name_nodes(graph, {"y_1": "the other one"})
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len({identity(node) for node in calls}) == 4


LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'triton_' for 'sm_90a'
ptxas info    : Function properties for triton_
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 400 bytes cmem[0]
"""


def test_registers_and_spilled_bytes_are_read() -> None:
    assert read_log(LOG) == (72, 12)
    with pytest.raises(ValueError, match="no text of ptxas"):
        read_log("")


@pytest.mark.parametrize(
    ("capability", "warps", "registers", "shared", "expected"),
    [
        (90, 4, 32, 0, 1.0),
        (90, 1, 8, 0, 0.5),  # 32 blocks of a warp, of 64 that have room
        (90, 8, 64, 0, 0.5),
        (90, 8, 65, 0, 0.375),  # 72 registers, seven warps in each quarter: three blocks
        (90, 8, 144, 0, 0.125),
        (90, 4, 32, 100 << 10, 0.125),  # two blocks
        (80, 4, 32, 100 << 10, 0.0625),  # one
        (100, 16, 128, 0, 0.25),
    ],
)
def test_occupancy_is_that_of_the_calculator(
    capability: int, warps: int, registers: int, shared: int, expected: float
) -> None:
    found = occupancy(CHIPS[capability], warps=warps, registers=registers, shared=shared)
    assert found == expected


def test_the_configuration_that_spills_least_is_shown() -> None:
    def tried(registers: int, spilled: int, warps: int) -> Resources:
        return Resources("k", 90, warps, registers, spilled, 0)

    few, spilling, wide = tried(255, 0, 8), tried(32, 4, 8), tried(32, 0, 1)
    assert least([spilling, few, wide]) == wide
    assert least([spilling, few]) == few


def test_without_triton_it_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name != "triton" and find(name, *rest)
    )
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name)
    )
    app = typer.Typer()
    app.command()(gpu_plan.main)
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 1
    assert done.output.strip().startswith("triton is not installed")
    assert done.output.count("\n") == 1


def test_programs_that_do_not_exist_are_refused() -> None:
    assert gpu_plan.chosen("") == list(all_variants())
    assert gpu_plan.chosen(" hooks before torch.compile ") == [PLAIN, "hooks before torch.compile"]
    with pytest.raises(typer.BadParameter, match="nothing is not one of plain;"):
        gpu_plan.chosen("nothing")


def graph_of(*launches: Launch, real: list[Launch], operators: dict[str, int]) -> dict[str, Any]:
    return {
        "launches": [[one.name, one.kind, one.bytes] for one in launches],
        "real": [[one.name, one.kind, one.bytes] for one in real],
        "operators": operators,
    }


def test_operators_count_by_what_they_launch() -> None:
    graph = graph_of(
        Launch("triton_poi_fused_0", "triton", 100),
        Launch("torch.ops.tmm.summarize", "tmm", 30),
        Launch("torch.ops.tmm.merge", "tmm", 7),
        real=[Launch("triton_red_fused_0", "triton", 31), Launch("cat", "library", 2)],
        operators={"summarize: 2 launches": 1},  # of the other it is not known
    )
    variant = {"graphs": [graph, graph]}
    assert gpu_plan.planned(variant) == Total(2, 4, 200, 74)
    assert gpu_plan.really(variant) == Total(4, 4, 262, 18)
    assert gpu_plan.roofline(Total(1, 1, 4_800_000, 0)) == pytest.approx(1e-6 + 4e-6)


COLUMNS = ",".join(builtin_reductions(FIVE_METRICS, is_complex=False)[0].columns)
CALLS: dict[str, tuple[Any, ...]] = {
    "rows": ("summarize", (8, 1024, 768), COLUMNS),
    "no divisor": ("summarize", (2_097_169,), COLUMNS),
    "heads": ("summarize_heads", (2, 8, 16), "count,sum"),  # by a kernel in Triton
    "nothing known": ("merge_of_tomorrow", (2,)),
}


def print_toy_plans() -> None:
    """In a process that takes itself for one with a GPU: a toy GPT, plain and measured."""
    from benchmarks.plan.capture import OperatorCall, plans_of
    from benchmarks.plan.operators import OperatorLaunches
    from benchmarks.plan.process import graph_numbers
    from benchmarks.plan.variants import step_of, workload_of

    mocked_gpu.mock_gpus()
    counter, found = OperatorLaunches(), {}
    for name in (PLAIN, "tmm, operators: with activation gradients"):
        torch._dynamo.reset()
        plans = plans_of(*step_of(all_variants()[name], workload_of(1, toy=True)))
        found[name] = {"graphs": [graph_numbers(plan, counter) for plan in plans]}
    calls = {
        name: counter.of(OperatorCall(operator, (torch.empty(shape, device="meta"), *more)))
        for name, (operator, shape, *more) in CALLS.items()
    }
    counted = {
        name: None if launches is None else [[one.name, one.kind, one.bytes] for one in launches]
        for name, launches in calls.items()
    }
    print(json.dumps({"programs": found, "operators": counted}))


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    text = printed_by("tests.test_plan_accounts", "print_toy_plans", mocked_gpu.ENVIRONMENT)
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


@pytest.fixture
def toy(printed: dict[str, Any]) -> dict[str, Any]:
    programs: dict[str, Any] = printed["programs"]
    return programs


def test_an_operator_is_counted_by_its_own_plan(printed: dict[str, Any]) -> None:
    counted = printed["operators"]
    rows = [Launch(*one) for one in counted["rows"]]
    size = 8 * 1024 * 768 * 4
    assert (len(rows), {one.kind for one in rows}) == (7, {"triton"})
    assert sum(one.bytes >= size for one in rows) == 1  # it is read once
    assert size < sum(one.bytes for one in rows) < 1.01 * size
    # Rows of 4096 and a rest, whose rows are merged by operations of torch.
    cut = [Launch(*one) for one in counted["no divisor"]]
    assert sum(one.kind == "triton" for one in cut) == 7 + 2
    assert any(one.kind == "library" for one in cut)
    heads = [Launch(*one) for one in counted["heads"]]
    assert [one.kind for one in heads] == ["triton", "library"]
    assert heads[0].bytes > 2 * 8 * 16 * 2  # which it reads
    assert counted["nothing known"] is None


def test_a_training_step_is_planned_for_a_gpu(toy: dict[str, Any]) -> None:
    forward, backward = toy[PLAIN]["graphs"]
    assert (forward["is_backward"], backward["is_backward"]) == (False, True)
    for graph in (forward, backward):
        names = [name for name, *_ in graph["launches"]]
        assert any("flash_attention" in name for name in names)  # as a GPU attends
        assert not any("for_cpu" in name or "cpp_fused" in name for name in names)
        assert all("device_str" not in source for source in graph["sources"].values())
    products = [name for name, *_ in forward["launches"] if name.startswith("extern_kernels")]
    assert len(products) == 5  # four of the layer, and the logits


def test_the_real_graph_of_tmm_is_planned(toy: dict[str, Any]) -> None:
    """Against what is known of the toy GPT: 13 tensors, 11 of which have a gradient."""
    (plain_forward, plain_backward), (forward, backward) = (
        variant["graphs"] for variant in toy.values()
    )
    assert forward["operators"] == {"summarize: 2 launches": 13, "pack: 1 launches": 1}
    assert backward["operators"] == {"summarize: 2 launches": 11}
    assert not forward["uncounted"]
    assert not backward["uncounted"]
    for plain, graph in ((plain_forward, forward), (plain_backward, backward)):
        kernels = [
            [Kernel(k["name"], frozenset(k["origins"]), frozenset(k["stored"])) for k in one]
            for one in (plain["kernels"], graph["kernels"])
        ]
        found = compare(*kernels)
        assert found.split == ()
        assert sum(found.added.values()) == len(kernels[1]) - len(kernels[0])


def test_a_plan_compared_with_itself_has_nothing_new(toy: dict[str, Any]) -> None:
    assert gpu_plan.split_lines({PLAIN: toy[PLAIN], "same": toy[PLAIN]}) == {"same": []}
    for own, other, found in gpu_plan.comparisons(toy[PLAIN], toy[PLAIN]):
        assert own is other
        assert not found.added
        assert all(plain == kernel for plain, kernel in found.pairs)


@pytest.mark.slow
def test_the_command_runs_on_a_toy(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; the extra `test` brings it")
    only = "tmm, operators: activations"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_plan", "--toy", "--save", "--only", only],
        cwd=ROOT,
        env={**os.environ, FOLDER_VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-plan-*.json")
    report = json.loads(path.read_text())
    assert list(report["programs"]) == [PLAIN, only]
    assert report["programs"][only]["split"] == []
    assert [line["variant"] for line in report["lines"]] == [PLAIN, only]
    assert report["lines"][1]["ratio"] > 1
    assert set(report["own_kernels"]) == {"80", "90", "100"}
    assert "kernels that spill: none" in done.stdout
