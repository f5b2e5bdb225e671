from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import tmm
from tests.browser import find_browser
from tmm.cli import app
from tmm.cli.coord_check_examples import BASE_WIDTH, GPT, MLP, Example, adam, gpt, mlp
from tmm.coordinate_check import TERMS, Growth
from tmm.coordinate_check import plot as plot_module
from tmm.coordinate_check.result import fit_power_law

UPDATE, INPUT_CHANGE, ACTIVATION = TERMS
BATCHES = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
WIDTHS = (8, 16, 32)


def make_model(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def check(**changes: Any) -> tmm.CoordinateCheck:
    arguments: dict[str, Any] = {
        "make_model": make_model,
        "widths": (8, 16),
        "batches": BATCHES,
        "loss": nn.functional.cross_entropy,
        "steps": 2,
        "seeds": 1,
    }
    return tmm.coord_check(**(arguments | changes))


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = check(seeds=2)
    assert capsys.readouterr() == ("", "")
    assert check(seeds=2, progress=True) == found
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "coordinate check" in shown.err
    assert "100%" in shown.err


def of_example(example: Example, widths: tuple[int, ...], seeds: int) -> tmm.CoordinateCheck:
    return tmm.coord_check(example.make_model, widths, example.batches, example.loss, seeds=seeds)


def hand_made(*sizes: tuple[str, Any, Any]) -> tmm.CoordinateCheck:
    growths = tuple(Growth.of(layer, term, WIDTHS, values) for layer, term, values in sizes)
    return tmm.CoordinateCheck(WIDTHS, 2, 3, growths)


FOUND = hand_made(
    ("first", UPDATE, [[1, 2], [2, 4], [4, 8]]),
    ("second.part", UPDATE, [[1, 2], [2, math.nan], [4, 8]]),
    ("first", INPUT_CHANGE, [[0, 0], [0, 0], [0, 0]]),
    ("second.part", INPUT_CHANGE, [[0, 1], [1, 1], [2, 3]]),
    ("first", ACTIVATION, [[3, 3.1], [3.1, 3], [3, 3]]),
)


# The fit


@settings(deadline=None)
@given(
    exponent=st.floats(-3, 3),
    constants=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4),
    widths=st.lists(st.integers(1, 5000), min_size=2, max_size=6, unique=True).map(sorted),
)
def test_exponents_are_recovered(
    exponent: float, constants: list[float], widths: list[int]
) -> None:
    sizes = np.asarray(widths, dtype=float)[:, None] ** exponent * np.asarray(constants)
    law = fit_power_law(widths, sizes)
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    if len(widths) > 2 or len(constants) > 1:
        assert law.standard_error == pytest.approx(0, abs=1e-6)
    else:
        assert math.isnan(law.standard_error)


def test_the_standard_error_is_that_of_repeated_experiments() -> None:
    generator = np.random.default_rng(0)
    widths = (64, 128, 256, 512)
    laws = []
    for _ in range(1000):
        own = generator.normal(size=3)  # of a seed: all its points lie higher or lower
        noise = 0.1 * generator.normal(size=(4, 3))
        sizes = np.exp(np.log(widths)[:, None] * 0.5 + own + noise)
        laws.append(fit_power_law(widths, sizes))
    exponents = np.array([law.exponent for law in laws])
    errors = np.array([law.standard_error for law in laws])
    assert exponents.mean() == pytest.approx(0.5, abs=0.01)
    assert np.sqrt((errors**2).mean()) == pytest.approx(exponents.std(), rel=0.1)


def test_what_has_no_logarithm_has_no_exponent_and_says_why() -> None:
    notes = {(growth.layer, growth.term): growth.note for growth in FOUND.growths}
    assert notes == {
        ("first", UPDATE): "",
        ("second.part", UPDATE): "not finite at width 16",
        ("first", INPUT_CHANGE): "zero at every width",
        ("second.part", INPUT_CHANGE): "zero at width 8",
        ("first", ACTIVATION): "",
    }
    assert all(math.isnan(growth.exponent) for growth in FOUND.growths if growth.note)
    assert FOUND.exponents(UPDATE) == {"first": pytest.approx(1.0)}
    with pytest.raises(ValueError, match="term='updates' is none of"):
        FOUND.exponents("updates")  # type: ignore[arg-type]


# What is measured


def test_sizes_are_those_of_coordinates() -> None:
    """Against the terms computed by hand, for the default layers and a seed of data each."""
    trained: list[tuple[nn.Module, nn.Module]] = []

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = make_model(width)
        start, _ = make_model(width)
        start.load_state_dict(model.state_dict())
        trained.append((model, start))
        return model, optimizer

    data = {
        seed: [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)] for seed in (0, 1)
    }
    found = check(make_model=make, batches=data.__getitem__, seeds=2)
    assert found.layers == ("0", "2")
    want: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad():
        for index, (model, start) in enumerate(trained):
            inputs = data[index % 2][2][0]
            hidden, hidden_0 = (module[1](module[0](inputs)) for module in (model, start))
            w, w_0 = model[2].weight, start[2].weight
            terms = {
                ("0", UPDATE): inputs @ (model[0].weight - start[0].weight).T,
                ("0", INPUT_CHANGE): torch.zeros(6, 1),
                ("0", ACTIVATION): model[0](inputs),
                ("2", UPDATE): hidden @ (w - w_0).T,
                ("2", INPUT_CHANGE): (hidden - hidden_0) @ w_0.T,
                ("2", ACTIVATION): model(inputs),
            }
            for key, vectors in terms.items():
                size = vectors.square().mean(-1).sqrt().mean().item()
                want.setdefault(key, []).append(size)
    got = {(growth.layer, growth.term): growth.sizes for growth in found.growths}
    assert got.keys() == want.keys()
    for key, (first, second, third, fourth) in want.items():
        means = (math.sqrt(first * second), math.sqrt(third * fourth))
        assert got[key] == pytest.approx(means, rel=1e-4, abs=1e-9), key


def test_layers_are_chosen_by_name_and_what_is_not_measured_is_named() -> None:
    class Part(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, width), nn.Linear(4, width)

        def forward(self, *, values: torch.Tensor) -> torch.Tensor:
            return self.used(values)

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Part(width)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    batches = ({"values": inputs} for inputs, _ in BATCHES)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.mean(-1) - target).square().mean()

    pairs = [(inputs, torch.zeros(6)) for inputs in batches]
    found = check(make_model=make, batches=iter(pairs), loss=loss)
    assert found.layers == ("used",)
    assert found.unmeasured == {
        "unused": "the forward pass did not call it, or got no tensor from it"
    }
    assert "not measured:\n    unused: the forward" in str(found)
    assert check(modules="[12]").layers == ("1", "2")


def test_a_compiled_model_gives_the_same() -> None:
    plain, compiled = check(), check(backend="aot_eager")
    for one, other in zip(plain.growths, compiled.growths, strict=True):
        assert one.sizes == pytest.approx(other.sizes, rel=1e-4)


def test_random_numbers_of_the_caller_stay_as_they_were() -> None:
    before = torch.random.get_rng_state()
    check()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_training_that_diverges_is_named() -> None:
    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = make_model(width)
        if width == 16:
            nn.init.constant_(model[2].weight, math.nan)
        return model, optimizer

    found = check(make_model=make)
    notes = {(growth.layer, growth.term): growth.note for growth in found.growths}
    assert notes.pop(("0", INPUT_CHANGE)) == "zero at every width"  # the data does not change
    assert set(notes.values()) == {"not finite at width 16"}


# Wrong arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8,)}, r"widths=\(8,\): a fit needs at least two"),
        ({"widths": (8, 8)}, "must be positive and rise"),
        ({"widths": (16, 8)}, "sort them"),
        ({"widths": (0, 8)}, "must be positive"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"batches": []}, "batches= has no batch"),
        ({"modules": "("}, "is not a regular expression"),
        ({"modules": "encoder"}, "modules='encoder' matches none of .*root module.*, 0"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": 8}, "widths=8 is not a list of numbers"),
        ({"widths": (4.0, 8.0)}, "must be integers"),
        ({"make_model": nn.Linear(4, 4)}, "make_model=.* is not a function"),
        ({"loss": None}, "loss=None is not a function"),
        ({"seeds": True}, "seeds=True is not a number of seeds"),
        ({"seeds": [0, 1]}, r"seeds=\[0, 1\] is not a number of seeds"),
        ({"batches": 3}, "neither iterable nor a function"),
        ({"batches": torch.zeros(3, 4)}, "pairs of inputs and targets, not Tensor"),
        ({"make_model": lambda width: nn.Linear(4, width)}, "must return the module and its opt"),
        ({"loss": lambda output, target: output}, "loss= must return a tensor with one element"),
    ],
)
def test_arguments_of_another_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check(**changes)


def test_an_optimizer_of_another_model() -> None:
    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        other = nn.Linear(4, width)
        return nn.Linear(4, width), torch.optim.SGD(other.parameters(), 0.1)

    with pytest.raises(ValueError, match="the optimizer holds no parameter of the module"):
        check(make_model=make)


def test_layers_that_differ_between_widths() -> None:
    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        first = nn.Linear(4, 3)
        model = nn.Sequential(first, *(nn.Linear(3, 3) for _ in range(width // 8)))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="other layers at width 16 than at width 8: 2; only sizes"):
        check(make_model=make)
    assert check(make_model=make, modules="[01]$").layers == ("0", "1")


# Models that would give exponents which look right and are not


def cached(make: Any) -> Any:
    kept: dict[int, Any] = {}
    return lambda width: kept.setdefault(width, make(width))


def around_trained_layers(make: Any) -> Any:
    head = nn.Linear(3, 3)

    def around(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(make(width)[0], head)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    return around


def with_another_optimizer(make: Any) -> Any:
    model, _ = make(8)
    return lambda width: (model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("again", [cached, around_trained_layers, with_another_optimizer])
def test_parameters_that_were_trained_before_are_refused(again: Any) -> None:
    with pytest.raises(ValueError, match="parameters that it had returned before"):
        check(make_model=again(make_model), seeds=2)


@pytest.mark.parametrize("is_held", [False, True])
def test_what_no_optimizer_trains_may_be_the_same_in_all_models(*, is_held: bool) -> None:
    shared = nn.Linear(4, 4).requires_grad_(False)

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = make_model(width)
        whole = nn.Sequential(shared, *model)
        return whole, torch.optim.SGD(whole.parameters(), lr=0.1) if is_held else optimizer

    assert check(make_model=make, seeds=2).layers == ("0", "1", "3")


@pytest.mark.parametrize(
    "size_of", [lambda width: 8, lambda width: width // 9 * 8, lambda width: min(width, 8)]
)
def test_sizes_that_do_not_depend_on_the_width_are_refused(size_of: Any) -> None:
    with pytest.raises(ValueError, match="same sizes at width 8 and at width 16"):
        check(make_model=lambda width: make_model(size_of(width + 1) or 1), widths=(8, 16))


@pytest.mark.parametrize("where", ["model", "targets", "nowhere"])
def test_what_is_written_to_a_batch_is_seen_by_no_other_training(where: str) -> None:
    inputs, targets = torch.randn(6, 4), torch.rand(6, 3)
    batches = [(inputs.clone(), targets.clone())]
    seen: list[float] = []

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, optimizer = make_model(width)
        if where == "model":
            model.register_forward_pre_hook(lambda module, given: (given[0].mul_(2),))
        return model, optimizer

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if where == "targets":
            target.mul_(2)
        seen.append(target.sum().item())
        return (output - target).square().mean()

    found = check(make_model=make, batches=batches, loss=loss, seeds=2)
    again = check(make_model=make, batches=batches, loss=loss, seeds=2)
    assert found == again
    assert len(set(seen)) == 1
    assert torch.equal(batches[0][0], inputs)
    assert torch.equal(batches[0][1], targets)


class Sharpness(torch.optim.SGD):
    """Needs a closure, as LBFGS does."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("closure", ["needed", "taken", "unknown"])
def test_optimizers_that_compute_gradients_themselves(closure: str) -> None:
    class Unknown(torch.optim.SGD):
        def step(self) -> None:  # type: ignore[override]
            super().step()

    kinds = {"needed": Sharpness, "taken": torch.optim.SGD, "unknown": Unknown}

    def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = make_model(width)
        return model, kinds[closure](model.parameters(), lr=0.1)

    assert check(make_model=make) == check()

    def lbfgs(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = make_model(width)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    assert check(make_model=lbfgs).exponents(UPDATE).keys() == {"0", "2"}


# Table and picture


def test_the_table_is_readable() -> None:
    lines = str(FOUND).splitlines()
    assert lines[0] == "Size of a coordinate by width after 3 steps, geometric mean of 2 seeds"
    assert lines[2].split() == [UPDATE, "8", "16", "32", "exponent"]
    assert lines[3].split() == ["first", "1.41", "2.83", "5.66", "+1.00", "±", "0.00"]
    assert re.search(r"second\.part .* nan .* not finite at width 16", lines[4])
    assert max(map(len, lines)) <= 80


def test_the_plot_has_a_panel_per_term_and_a_line_per_layer() -> None:
    figure = FOUND.plot("A title")
    lines = [(line.name, line.xaxis, line.showlegend, list(line.x)) for line in figure.data]
    assert lines == [
        ("first", "x", True, [8, 16, 32]),
        ("second.part", "x", True, [8, 32]),  # what is not finite is left out
        ("second.part", "x2", False, [16, 32]),  # and so is zero
        ("first", "x3", False, [8, 16, 32]),
    ]
    assert "exponent +1.00" in figure.data[0].hovertemplate
    assert {axis.type for axis in (figure.layout.xaxis, figure.layout.yaxis)} == {"log"}
    assert figure.layout.title.text.startswith("A title<br>")


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    assert FOUND.save(tmp_path / "check.html") == (tmp_path / "check.html",)
    page = (tmp_path / "check.html").read_text()
    assert "second.part" in page
    assert not re.search(r"<script[^>]+src=", page)
    assert [path.name for path in tmp_path.iterdir()] == ["check.html"]


def test_without_an_ending_both_are_written(tmp_path: Path) -> None:
    find_browser()
    written = FOUND.save(tmp_path / "width.check")
    assert [path.name for path in written] == ["width.check.html", "width.check.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_without_plotly_the_message_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tmm.views.plots.style.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs plotly: pip install 'tmm-compile\[plot\]'"):
        FOUND.plot()
    result = CliRunner().invoke(app, ["coord-check", "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "tmm-compile[plot]" in re.sub(r"\s*│\s*", " ", result.stderr)


# muP


@pytest.mark.parametrize("model", [MLP, GPT])
def test_at_the_base_width_both_parametrizations_train_alike(model: Any) -> None:
    """They differ in what muP sets to zero only."""
    torch.manual_seed(0)
    standard = model(BASE_WIDTH, "standard")
    torch.manual_seed(0)
    mup = model(BASE_WIDTH, "mup")
    for (name, own), other in zip(standard.named_parameters(), mup.parameters(), strict=True):
        zero = name.endswith(("readout.weight", "query.weight"))
        assert torch.equal(other, torch.zeros_like(own) if zero else own)
    mup.load_state_dict(standard.state_dict())
    batches = torch.randn(3, 8, 32) if model is MLP else torch.randint(256, (3, 8, 16))
    pairs = [
        (own, adam(own, BASE_WIDTH, kind, 0.01))
        for own, kind in ((standard, "standard"), (mup, "mup"))
    ]  # type: ignore[arg-type]
    for batch in batches:
        losses = []
        for own, optimizer in pairs:
            losses.append(own(batch).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)


def test_mup_stops_the_growth_of_updates() -> None:
    widths = (64, 128, 256)
    standard, mup = (of_example(mlp(kind), widths, seeds=1) for kind in ("standard", "mup"))
    for layer in ("hidden_1", "hidden_2"):
        assert standard.exponents(UPDATE)[layer] > 0.5
        assert abs(mup.exponents(UPDATE)[layer]) < 0.2


@pytest.fixture
def only_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    def examples() -> Iterator[Example]:
        yield mlp("mup")

    monkeypatch.setattr("tmm.cli.coord_check_examples.examples", examples)


@pytest.mark.usefixtures("only_mlp")
def test_the_command_prints_exponents_and_writes_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot_module, "write", lambda plot, path: path.write_text(str(plot)))
    folder = tmp_path / "new" / "plots"
    result = CliRunner().invoke(app, ["coord-check", "--quick", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    rows = [line.strip("│").split("│") for line in result.output.splitlines() if "│" in line]
    cells = {name.strip(): [cell.strip() for cell in others] for name, *others in rows}
    assert list(cells) == ["input", "hidden_1", "hidden_2", "readout"]
    assert cells["input"][1] == "0"
    for row in cells.values():
        assert all(cell == "0" or abs(float(cell.split()[0])) < 0.15 for cell in row)
    assert "Largest exponent of an update: " in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["mlp-mup.html", "mlp-mup.png"]


@pytest.mark.usefixtures("only_mlp")
def test_the_command_without_a_browser_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("tmm.coordinate_check.coordinate_check.coord_check", lambda *_, **__: FOUND)
    monkeypatch.setattr(plot_module, "write", fail)
    result = CliRunner().invoke(app, ["coord-check", "--quick", "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "requires Google Chrome" in result.stderr
    assert "not finite at width 16" in result.output
    assert "Largest exponent of an update: +1.00 ± 0.00, of first." in result.output


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, gpt])
def test_under_mup_no_exponent_differs_from_zero_and_otherwise_hidden_updates_grow(
    make: Any,
) -> None:
    widths = (128, 256, 512, 1024)
    standard, mup = (of_example(make(kind), widths, seeds=3) for kind in ("standard", "mup"))
    hidden = [
        layer for layer in mup.layers if re.search(r"hidden|query|key|value|output|up|down", layer)
    ]
    assert len(hidden) == (2 if make is mlp else 12)
    for layer in hidden:
        assert standard.exponents(UPDATE)[layer] > 0.3, (layer, str(standard))
    for term in TERMS:
        for layer, exponent in mup.exponents(term).items():
            assert abs(exponent) <= 0.15, (term, layer, str(mup))
    # The input change of a readout or query that was zero is zero, and so is that of the data.
    zeros = {growth.layer for growth in mup.growths if growth.note == "zero at every width"}
    assert zeros == {layer for layer in mup.layers if re.search("readout|query|input", layer)}
    assert all(growth.note in ("", "zero at every width") for growth in mup.growths)


@pytest.mark.usefixtures("only_mlp")
def test_the_command_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmm.coordinate_check.coordinate_check.coord_check", lambda *_, **__: FOUND)
    result = CliRunner().invoke(app, ["coord-check", "--quick", "--json"])
    found = json.loads(result.stdout)
    assert found["widths"] == [128, 256, 512]
    ((growth, *_),) = found["examples"].values()
    assert (growth["layer"], growth["exponent"]) == ("first", pytest.approx(1))
