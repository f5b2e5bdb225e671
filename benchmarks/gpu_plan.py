"""What Inductor plans for a GPU, computed on a CPU: launches, bytes, registers.

    python -m benchmarks.gpu_plan [--layers 12] [--only "NAME;..."] [--own all] [--quick] [--save]

The training step of a GPT-2 124M (bfloat16, batch 8 x 1,024; forward, loss and backward), with five
metrics of all modules: tmm's real programs (``benchmarks/plan/capture.py``), and forward hooks that
``torch.compile`` traces. Bytes are those of the arguments of each launch, each once, or twice if it
overwrites what it reads. In a plan, an operator of tmm is one line; "really" counts what it
launches instead, from the plan of its kernel.

The kernels are then compiled for sm_90 by Triton's own assembler: registers, spilled bytes and
occupancy of those into which something was fused, beside those of the plain program. So are tmm's
own kernels, for sm_80, sm_90 and sm_100: one form of each, or with ``--own all`` all of them. Of
the configurations that Inductor would time on a GPU, that one is shown that spills least.

The estimate takes the bytes at 4.8 TB/s, as an H200's data sheet gives them, and 2 us for each
launch. It leaves arithmetic out, and that caches hold something: of the plain step, whose products
are bound by arithmetic, it is too short, so that what is added weighs more than it will. Nothing
was run on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.mocked_gpu import ENVIRONMENT
from benchmarks.plan.account import Launch, Total
from benchmarks.plan.compare import Comparison, compare
from benchmarks.plan.process import TOY, kernel_of
from benchmarks.plan.variants import PLAIN, all_variants
from benchmarks.report import save_report
from benchmarks.timing import environment

ROOT = Path(__file__).parent.parent
BYTES_PER_SECOND, LAUNCH_SECONDS = 4.8e12, 2e-6
CAPABILITIES = (80, 90, 100)


class Own(StrEnum):
    """Which forms of tmm's own kernels are compiled: one of each, all, or none."""

    QUICK = "quick"
    ALL = "all"
    NONE = "none"


def run_part(*arguments: str, given: str = "") -> Any:
    """What a part of the plan prints, in a process of its own with caches of its own."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            name: f"{folder}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan.process", *arguments],
            env={**os.environ, **ENVIRONMENT, **caches},
            cwd=ROOT,
            check=False,
            input=given,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def launches(found: Iterable[Sequence[Any]]) -> list[Launch]:
    """Launches as a part prints them."""
    return [Launch(*one) for one in found]


def planned(variant: Mapping[str, Any]) -> Total:
    """What a plan says, forward and backward together."""
    parts = [Total.of(launches(graph["launches"])) for graph in variant["graphs"]]
    return sum(parts, Total())


def really(variant: Mapping[str, Any]) -> Total:
    """The same, with what tmm's operators launch in the place of their calls.

    An operator whose launches are not known stays one launch.
    """
    total = Total()
    for graph in variant["graphs"]:
        counted = {name.split(":")[0] for name in graph["operators"]}
        kept = [
            one
            for one in launches(graph["launches"])
            if one.kind != "tmm" or one.name.split(".")[-1] not in counted
        ]
        total += Total.of([*kept, *launches(graph["real"])])
    return total


def roofline(total: Total) -> float:
    """Seconds, as an estimate."""
    return total.bytes / BYTES_PER_SECOND + total.launches * LAUNCH_SECONDS


def comparisons(
    plain: Mapping[str, Any], variant: Mapping[str, Any]
) -> Iterable[tuple[Mapping[str, Any], Mapping[str, Any], Comparison]]:
    """Graph by graph: the plain one, the other one, and what became of its launches."""
    for own, other in zip(plain["graphs"], variant["graphs"], strict=True):
        lists = ([kernel_of(kernel) for kernel in graph["kernels"]] for graph in (own, other))
        yield own, other, compare(*lists)


def totals_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Launches and bytes of each variant, and what it adds."""
    columns = ("program", "Triton", "other", "GB Triton", "GB other", "added: launches", "bytes")
    table = Table(*columns, "really: launches", "bytes", "estimate", title="planned for sm_90")
    plain, plain_really = planned(found[PLAIN]), really(found[PLAIN])
    for name, variant in found.items():
        total, real = planned(variant), really(variant)
        added, added_really = total - plain, real - plain_really
        cells = [
            *(str(total.triton), str(total.other)),
            *(f"{total.triton_bytes / 1e9:.2f}", f"{total.other_bytes / 1e9:.2f}"),
        ]
        if name != PLAIN:
            cells += [f"{added.launches:+d}", f"{added.bytes / plain.bytes:+.2%}"]
            cells += [f"{added_really.launches:+d}", f"{added_really.bytes / plain.bytes:+.2%}"]
            estimate = roofline(added_really) / roofline(plain_really)
            cells.append(f"{roofline(added_really) * 1e3:+.2f} ms, {estimate:+.1%}")
        else:
            cells += ["", "", "", "", f"{roofline(real) * 1e3:.1f} ms"]
        table.add_row(name, *cells)
    return table


def changed_kernels(
    found: Mapping[str, Mapping[str, Any]], resources: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Of each plain kernel that has become another one, and of each that was added: what they take.

    An added one has no plain one.
    """
    rows = []
    for name, variant in found.items():
        if name == PLAIN:
            continue
        for index, (own, other, comparison) in enumerate(comparisons(found[PLAIN], variant)):

            def row(
                plain: str | None,
                kernel: str,
                times: int,
                name: str = name,
                index: int = index,
                backward: bool = own["is_backward"],
            ) -> dict[str, Any]:
                return {
                    "program": name,
                    "graph": "backward" if backward else "forward",
                    "plain_kernel": plain,
                    "kernel": kernel,
                    "launches": times,
                    "plain": plain and best(resources[source_name(PLAIN, index, plain)]),
                    "now": best(resources[source_name(name, index, kernel)]),
                }

            rows += [
                row(plain, kernel, times)
                for (plain, kernel), times in comparison.pairs.items()
                if _text(own["sources"], plain) != _text(other["sources"], kernel)
            ]
            rows += [row(None, kernel, times) for kernel, times in comparison.added.items()]
    return rows


def _text(sources: Mapping[str, str], name: str) -> str:
    return sources[name].replace(name, "kernel")


def source_name(program: str, graph: int, kernel: str) -> str:
    """The name of a kernel among those of all programs."""
    return f"{kernel}@{graph}@{program}"


def all_sources(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The kernels of all programs."""
    return {
        source_name(name, index, kernel): source
        for name, variant in found.items()
        for index, graph in enumerate(variant["graphs"])
        for kernel, source in graph["sources"].items()
    }


def best(tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the configurations of a kernel the one that spills least, then that with most threads."""
    return dict(min(tried, key=lambda one: (one["spilled"], -one["occupancy"], one["registers"])))


def takes(numbers: Mapping[str, Any]) -> str:
    """Registers, spilled bytes and occupancy in a cell."""
    return f"{numbers['registers']}, {numbers['spilled']}, {numbers['occupancy']:.0%}"


def changed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The kernels of the plain program that are others now."""
    title = "kernels that are others now: registers, spilled bytes, occupancy on sm_90"
    columns = ("program", "graph", "plain kernel", "kernel", "launches", "plain", "now")
    table = Table(*columns, title=title)
    for row in rows:
        if row["plain_kernel"] is None:
            continue
        cells = (row["program"], row["graph"], row["plain_kernel"][:50], row["kernel"][:50])
        table.add_row(*cells, str(row["launches"]), takes(row["plain"]), takes(row["now"]))
    return table


def added_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """What launches of Triton kernels a program has that do no work of the plain one."""
    if not rows:
        return "no launch of a Triton kernel was added"
    launches = sum(row["launches"] for row in rows)
    registers = max(row["now"]["registers"] for row in rows)
    return f"{launches} launches of {len(rows)} Triton kernels added, {registers} registers at most"


def split_lines(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """By program: the plain kernels that were split, and the launch that a part of them became."""
    lines: dict[str, list[list[str]]] = {}
    for name, variant in found.items():
        if name != PLAIN:
            lines[name] = [
                list(pair)
                for _, _, comparison in comparisons(found[PLAIN], variant)
                for pair in comparison.split
            ]
    return lines


def own_table(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> Table:
    """What tmm's own kernels take on each chip."""
    chips = [f"sm_{capability}" for capability in found]
    title = "tmm's own kernels: registers, spilled bytes, occupancy"
    table = Table("kernel", *chips, title=title)
    by_chip = [{one["kernel"]: one for one in kernels} for kernels in found.values()]
    for kernel in dict.fromkeys(name for kernels in by_chip for name in kernels):
        cells = [takes(kernels[kernel]) if kernel in kernels else "" for kernels in by_chip]
        table.add_row(kernel[:90], *cells)
    return table


def chosen(only: str) -> list[str]:
    """The programs that are asked for, behind the plain one.

    Raises:
        typer.BadParameter: for a name that does not exist.
    """
    known = all_variants()
    wanted = {name.strip() for name in only.split(";")} - {""}
    if unknown := wanted - known.keys():
        raise typer.BadParameter(
            f"--only: {'; '.join(sorted(unknown))} is not one of {'; '.join(known)}"
        )
    return [name for name in known if not wanted or name in wanted | {PLAIN}]


def missing() -> str | None:
    """What this machine lacks, in a sentence; None if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, with which kernels of GPUs are planned: pip install triton"
    if shutil.which("g++") is None:
        return "there is no g++, which autograd needs to be told of a GPU that is not there"
    return None


def main(
    layers: Annotated[int, typer.Option(min=1, help="Of the GPT's 12 layers.")] = 12,
    only: Annotated[str, typer.Option(help="Programs, separated by semicolons.")] = "",
    quick: Annotated[bool, typer.Option(help="Two layers.")] = False,
    toy: Annotated[bool, typer.Option(help="A toy model: only shows that it runs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
    own: Annotated[Own, typer.Option(help="Which of tmm's own kernels to compile.")] = Own.QUICK,
) -> None:
    """Count what Inductor plans for a GPU."""
    if (sentence := missing()) is not None:
        print(sentence)
        raise typer.Exit(1)
    names = chosen(only)
    size = TOY if toy else str(2 if quick else layers)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = run_part("variant", name, size)
        print(f"{name}: planned", flush=True)
    resources = run_part("kernels", given=json.dumps(all_sources(found)))
    rows = changed_kernels(found, resources)
    splits = split_lines(found)
    console = Console(width=170)
    console.print(found[PLAIN]["workload"])
    console.print(totals_table(found))
    console.print(changed_table(rows))
    for name, pairs in splits.items():
        added = [row for row in rows if row["program"] == name and row["plain_kernel"] is None]
        text = "; ".join(f"{plain} (a part became {part})" for plain, part in pairs)
        split = f"split: {text}" if text else "no plain kernel was split in two"
        console.print(f"{name}: {added_line(added)}; {split}")
    for name, variant in found.items():
        for graph in variant["graphs"]:
            called = Counter(one.name for one in launches(graph["launches"]) if one.kind == "tmm")
            for operator, calls in called.items():
                if operator.split(".")[-1] in graph["uncounted"]:
                    console.print(f"{name}: {calls} x {operator}, each counted as one launch")
    spilling = [name for name, tried in resources.items() if best(tried)["spilled"]]
    console.print(f"kernels that spill: {', '.join(spilling) or 'none'}")
    own_found: dict[int, Any] = {}
    if own != Own.NONE:
        for capability in CAPABILITIES:
            more = ("quick",) if own == Own.QUICK else ()
            own_found[capability] = run_part("own", str(capability), *more)
        console.print(own_table(own_found))
    if save:
        print(save_report("gpu-plan", "sm90", report_of(found, rows, splits, own_found)))


def report_of(
    found: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    splits: Mapping[str, Sequence[Sequence[str]]],
    own_found: Mapping[int, Any],
) -> dict[str, Any]:
    """All of it but the texts, as one may compare it with another day's."""
    programs = {}
    for name, variant in found.items():
        total, real = planned(variant), really(variant)
        programs[name] = {
            "planned": vars(total),
            "really": vars(real),
            "estimated_seconds": roofline(real),
            "graphs": [
                {
                    "is_backward": graph["is_backward"],
                    "planned": vars(Total.of(launches(graph["launches"]))),
                    "operators": graph["operators"],
                    "counted_as_one_launch": graph["uncounted"],
                }
                for graph in variant["graphs"]
            ],
            "split": splits.get(name, []),
        }
    lines = [
        {
            "variant": name,
            "ratio": really(variant).bytes / really(found[PLAIN]).bytes,
            "note": "bytes, to those of the plain program",
        }
        for name, variant in found.items()
    ]
    return {
        "title": f"planned for sm_90: {found[PLAIN]['workload']}",
        "environment": environment() | {"triton": importlib.metadata.version("triton")},
        "assumptions": {"bytes_per_second": BYTES_PER_SECOND, "launch_seconds": LAUNCH_SECONDS},
        "programs": programs,
        "changed_kernels": list(rows),
        "own_kernels": own_found,
        "lines": lines,
    }


if __name__ == "__main__":
    typer.run(main)
