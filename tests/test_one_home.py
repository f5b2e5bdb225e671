"""Facts that have one home: nobody else writes them down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tmm
from tests.test_floors import FILES
from tmm.analysis.order import execution_ranks
from tmm.core import families, module_names
from tmm.core.families import FAMILIES, Family, Phase
from tmm.core.metrics import METRICS, STATE_METRICS, UNDEFINED, StateMetric
from tmm.core.records import Site
from tmm.module_monitor.names import default_format_module_name_fn
from tmm.runtime.key_owners import owner_of
from tmm.spec import spec
from tmm.spec.rules import Rule
from tmm.steps.optimizer_state import state_value
from tmm.views.plots.groups import group_keys
from tmm.views.plots.scale import SHARES

KEYS = "tmm.core.keys"

WITH_SLASHES = {
    "tmm.cli.training_progress": "steps of steps",
    "tmm.cli.watch_frame": "units per second",
    "tmm.core.families": "what terms of the coordinate check begin with",
    "tmm.integrations.lightning_trainer": "names that Lightning gives to learning rates",
    "tmm.integrations.torchtnt": "names of what TorchTNT evaluates",
    "tmm.integrations.torchtnt_training": "names of learning rates",
    "tmm.kernels.attention.attention_host": "paths",
    "tmm.runs.artifacts": "paths",
    "tmm.runs.keyed_files": "paths in HDF5",
    "tmm.runs.logged_numbers": "names of nested dictionaries",
    "tmm.runs.remote": "paths",
    "tmm.runs.run_folders": "paths",
    "tmm.runs.store_listing": "paths",
    "tmm.sinks.mlflow": "paths",
    "tmm.steps.unwatched": "a message",
    "tmm.views.plots.groups": "titles of pictures",
}
"""Files that join or split text by slashes, and what it is: no keys."""

_STARTS = re.compile(rf"(?<!\w)({'|'.join(FAMILIES)}|attention_\w+)/|^RCC ")


def strings(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The texts in a program but those that document it; whether each is joined with others."""
    documents = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    wholes = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    joined = {id(part) for whole in wholes for part in whole.values}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    for node in texts:
        if isinstance(node.value, str) and id(node) not in documents:
            yield node.value, id(node) in joined


def keys_in(source: str) -> list[str]:
    """The texts in a program that look like keys, or like what is between their parts."""
    found = []
    for text, is_joined in strings(ast.parse(source)):
        begins = text.startswith("/") and not text.startswith("// ")  # a comment in C++
        is_between = text == "/" or (is_joined and (begins or text.endswith("/")))
        if is_between or _STARTS.search(text):
            found.append(text)
    return found


def test_keys_are_composed_and_parsed_in_one_file() -> None:
    found = {module: keys_in(path.read_text()) for module, path in FILES.items()}
    assert {module for module, texts in found.items() if texts} == WITH_SLASHES.keys() | {KEYS}, {
        module: texts for module, texts in found.items() if texts and module not in WITH_SLASHES
    }


@pytest.mark.parametrize(
    "line",
    [
        "f'{family}/{site}'",
        "key.partition('/')",
        "key.startswith('system/')",
        "x = r'system/(cpu|gpu)'",
        "key = f'activation/{site}/rms'",
        "key.removesuffix(f'/{metric}')",
        "x = 'attention_entropy/0.head_0'",
        "name.startswith('RCC ')",
    ],
)
def test_keys_are_found(line: str) -> None:
    assert keys_in(line)


@pytest.mark.parametrize("line", ["'''activation/0/rms'''", "x = 'a/b'", "Path('runs/demo')"])
def test_what_is_no_key_is_not_found(line: str) -> None:
    assert not keys_in(line)


ROUTERS = Family("router_load", "modules", Phase.FORWARD, ("top_share",))


class Router(torch.nn.Module):
    """A router, behind a graph break if it ``breaks``."""

    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.router = torch.nn.Linear(8, 4)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return self.router(x).softmax(-1)


@pytest.mark.parametrize("way", ["compiled", "broken", "uncompiled"])
def test_a_family_of_outputs_is_a_line_of_a_table(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (families, spec):
        monkeypatch.setattr(module, "FAMILIES", {**FAMILIES, ROUTERS.name: ROUTERS})
    own = (("top_share", lambda x: x.softmax(-1).amax(-1)),)
    rule = Rule(ROUTERS.name, "modules", (), own, r".*router")
    model = torch.nn.Sequential(Router(breaks=way == "broken"))
    asked = tmm.Spec(rule, tmm.activation("rms"))
    program = model if way == "uncompiled" else torch.compile(model, backend="eager")
    x = torch.randn(16, 8)
    monitor = tmm.monitor(tmm.instrument(program, asked, run=tmp_path / "run"))
    with monitor.step(0):
        program(x)
    key = "router_load/0.router/top_share"
    value = monitor.get_step_metrics()[key]
    assert value == pytest.approx(model[0].router(x).softmax(-1).amax(-1).mean().item())
    tmm.remove(program)
    with tmm.open_run(monitor.path) as run:
        (group,) = (g for g in group_keys(run, run.keys())[0] if g.family == ROUTERS.name)
        assert group.layers == ("0.router",)
        assert execution_ranks(run)[key][0] is Phase.FORWARD


def test_whose_keys_are_is_told_by_the_table_of_families() -> None:
    for family in FAMILIES.values():
        is_of_parameters = owner_of(family.name, Site("0.weight"), "0.weight").startswith("the p")
        assert is_of_parameters == (family.subject == "parameters")


def test_what_is_known_of_metrics_is_said_in_their_table() -> None:
    undefined = {
        "std",
        "kurtosis",
        "cosine",
        "alignment",
        "relative_norm",
        "effective_lr",
        "histogram",
    }
    assert set(UNDEFINED) == undefined
    attention = {"normalized_entropy", "max_probability", "sink_mass", "entropy"}
    assert {"zero_fraction", "cosine", "alignment"} | {
        f"attention_{n}" for n in attention
    } == SHARES


def test_a_metric_of_the_state_of_optimizers_is_a_line_of_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = METRICS["absmax"].value
    own = StateMetric(("absmax",), value, kept="exp_avg_sq")
    monkeypatch.setitem(STATE_METRICS, "exp_avg_sq_absmax", own)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = optimizer.state[parameter]
    found = state_value("exp_avg_sq_absmax", optimizer, optimizer.param_groups[0], state)
    assert found is state["exp_avg_sq"]


METADATA = {"example_value", "grapharg", "nn_module_stack", "source_fn_stack", "stack_trace"}


def test_what_the_tracer_tells_of_nodes_is_read_in_one_file() -> None:
    found = {
        module
        for module, path in FILES.items()
        if any(text in METADATA for text, _ in strings(ast.parse(path.read_text())))
    }
    # Graphs of `tmm.find_nonfinite` are those of another tracer.
    assert found == {"tmm.passes.graph.values", "tmm.nonfinite.places"}


def test_which_module_a_call_is_of_is_read_in_one_file() -> None:
    found = {m for m, path in FILES.items() if 'partition("@")' in path.read_text()}
    assert found == {"tmm.passes.graph.values", "tmm.nonfinite.places"}


def test_a_wrapper_is_a_name_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    class Guard(torch.nn.Module):
        def __init__(self, net: torch.nn.Module) -> None:
            super().__init__()
            self._guarded = net

    monkeypatch.setattr(module_names, "WRAPPERS", (*module_names.WRAPPERS, "_guarded"))
    net = torch.nn.Sequential(Guard(torch.nn.Linear(2, 2)))
    assert set(module_names.relative_names(Guard(net)).values()) == {"", "0"}
    names = module_names.unwrapped_names(Guard(net).state_dict())
    assert set(names.values()) == {"0.weight", "0.bias"}
    assert default_format_module_name_fn("_guarded.0._guarded") == "0"
