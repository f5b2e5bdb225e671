"""Pictures of runs: what they draw, and that fewer points tell the same."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tmm
from tmm.cli import app
from tmm.core.keys import info_of, layer_of
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.recorded_run import Run
from tmm.runtime.store.run_writer import RunWriter
from tmm.views.plots import figure, write_figure
from tmm.views.plots.groups import group_keys
from tmm.views.plots.reduce import (
    FINITE,
    MINUS_INFINITY,
    NAN,
    PLUS_INFINITY,
    reduce_table,
    thin,
    worst_of,
)
from tmm.views.plots.scale import scale_for
from tmm.views.plots.style import INFINITY_COLOUR, NAN_COLOUR

anything = st.floats() | st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0])


def recorded(folder: Path, steps: dict[int, dict[str, float]]) -> Run:
    """A run whose keys are executed in the order in which they first appear."""
    keys = list(dict.fromkeys(key for values in steps.values() for key in values))
    sites: dict[str, int] = {}
    infos = {}
    for key in keys:
        info = info_of(key)
        place = sites.setdefault(f"{info.kind} {info.site}", len(sites))
        infos[key] = info_of(key, place)
    with RunWriter(folder, info={"name": "a <run>"}) as writer:
        for step, values in steps.items():
            table = Table(tuple(infos[key] for key in values), np.array(list(values.values())))
            writer.submit(StepRecord(step, (table,)))
    return tmm.open_run(folder)


def of_layers(folder: Path, steps: int = 20) -> Run:
    def values(step: int) -> dict[str, float]:
        found = {
            f"activation/{layer}/{metric}": (1.0 + step)
            * (10.0**place)
            * (-1) ** (metric == "mean")
            for place, layer in enumerate(("embed", "blocks.0", "blocks.1", "head"))
            for metric in ("rms", "mean")
        }
        found |= {f"gradient/{layer}.weight/norm": 1e-3 * (step + 1) for layer in ("head", "embed")}
        return found | {"loss": 1 / (step + 1)}

    records = {step: values(step) for step in range(steps)}
    records[7]["activation/blocks.1/rms"] = math.nan
    records[9]["activation/blocks.0/rms"] = math.inf
    return recorded(folder, records)


# Reading many keys at once


def test_a_table_is_the_series_side_by_side(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    keys = [f"activation/a.{place}/rms" for place in range(700)]
    for part in range(3):  # segments that overlap, with other keys and columns
        chosen = generator.permutation(keys)[: 300 + 100 * part]
        infos = tuple(info_of(str(key), 700 - keys.index(str(key))) for key in chosen)
        with RunWriter(tmp_path, info={}) as writer:
            for step in range(40 * part, 40 * part + 60):
                values = generator.standard_normal(len(infos))
                values[generator.random(len(infos)) < 0.05] = math.nan
                part_of = slice(0, len(infos) // (1 + step % 3))
                writer.submit(StepRecord(step, (Table(infos[part_of], values[part_of]),)))
    with tmm.open_run(tmp_path) as run:
        asked = [str(key) for key in generator.permutation(run.keys())[:450]]
        steps, values, measured = run.table(asked)
        assert steps.tolist() == run.steps.tolist() == list(range(140))
        for key, row, there in zip(asked, values, measured, strict=True):
            own_steps, own_values = run.series(key)
            assert own_steps.tolist() == steps[there].tolist()
            np.testing.assert_array_equal(own_values, row[there])
            assert np.isnan(row[~there]).all()
        with pytest.raises(KeyError, match="nearest.*a.1/"):
            run.table(["activation/a.1/rns"])
        assert run.table([])[1].shape == (0, 140)


def test_a_table_of_nothing(tmp_path: Path) -> None:
    with RunWriter(tmp_path, info={}):
        pass
    with tmm.open_run(tmp_path) as run:
        assert run.table([])[1].shape == (0, 0)


def test_histograms_are_in_no_table(tmp_path: Path) -> None:
    infos = (KeyInfo("activation/a/histogram", "activation", "a", 0, "sum"),)
    with RunWriter(tmp_path, info={}) as writer:
        writer.submit(StepRecord(0, (), (Table(infos, np.ones((1, 4))),)))
    with tmm.open_run(tmp_path) as run:
        assert run.is_histogram("activation/a/histogram")
        with pytest.raises(ValueError, match="is a histogram; read it with series"):
            run.table(["activation/a/histogram"])
        with pytest.raises(ValueError, match="no numbers to plot"):
            run.plot()


# Fewer points


def by_hand(values: list[float]) -> tuple[float, float, int]:
    """Least and largest finite value, and what there is."""
    finite = [value for value in values if math.isfinite(value)]
    flags = FINITE * bool(finite) | NAN * any(map(math.isnan, values))
    flags |= PLUS_INFINITY * (math.inf in values) | MINUS_INFINITY * (-math.inf in values)
    return min(finite, default=math.nan), max(finite, default=math.nan), flags


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_buckets_keep_extremes_and_what_is_not_finite(data: st.DataObject) -> None:
    keys, count = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40))
    columns = data.draw(st.integers(1, 50))
    cells = data.draw(st.lists(anything | st.none(), min_size=keys * count, max_size=keys * count))
    grid = np.array(cells, dtype=object).reshape(keys, count)
    measured = np.array([cell is not None for cell in cells], dtype=bool).reshape(keys, count)
    values = np.where(measured, grid, math.nan).astype(np.float64)
    steps = np.cumsum(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)) or [])
    reduced = reduce_table(steps.astype(np.int64), values, measured, columns)

    used = [place for place in range(count) if measured[:, place].any()]
    assert reduced.steps == len(used)
    assert reduced.columns == min(len(used), columns)
    assert reduced.is_whole == (len(used) <= columns)
    covered: list[int] = []
    for column in range(reduced.columns):
        first, last = reduced.first[column], reduced.last[column]
        places = [place for place in used if first <= steps[place] <= last]
        assert [steps[places[0]], steps[places[-1]]] == [first, last]
        covered += places
        for key in range(keys):
            part = [float(values[key, place]) for place in places if measured[key, place]]
            found = (reduced.low[key, column], reduced.high[key, column])
            *extremes, flags = by_hand(part)
            assert np.array_equal(found, extremes, equal_nan=True)
            assert reduced.flags[key, column] == flags
    assert covered == used
    for which, chosen in (("smallest", min), ("largest", max)):
        worst = reduced.worst(which)  # type: ignore[arg-type]
        finite = values[np.isfinite(values) & measured]
        if finite.size:
            assert chosen(worst[np.isfinite(worst)]) == chosen(finite)
    if finite.size:
        farthest = reduced.worst("farthest from zero")
        assert np.nanmax(np.abs(farthest)) == np.abs(finite).max()
        assert set(farthest[np.isfinite(farthest)]) <= set(finite)


@settings(deadline=None, max_examples=200)
@given(st.lists(anything, max_size=200), st.integers(7, 60))
def test_a_thinned_curve_keeps_extremes_ends_and_what_is_not_finite(
    numbers: list[float], most: int
) -> None:
    values = np.array(numbers, dtype=np.float64)
    places = thin(values, most)
    assert len(places) <= most
    assert (np.diff(places) > 0).all()
    kept = values[places]
    if len(values) <= most:
        assert len(kept) == len(values)
    if len(values):
        assert {0, len(values) - 1} <= set(places.tolist())
    for part in (values, kept):
        finite = part[np.isfinite(part)]
        summary = [finite.min(), finite.max()] if finite.size else []
        kinds = [np.isnan(part).any(), np.isposinf(part).any(), np.isneginf(part).any()]
        if part is values:
            expected = (summary, kinds)
    assert (summary, kinds) == expected


def test_one_spike_among_a_million_steps_is_kept() -> None:
    values = np.zeros(1_000_000)
    values[[123_456, 777_777]] = 5.0, math.nan
    assert {123_456, 777_777} <= set(thin(values, 100).tolist())


def test_reducing_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="columns=0"):
        reduce_table(np.arange(2), np.zeros((1, 2)), np.ones((1, 2), dtype=bool), 0)
    with pytest.raises(ValueError, match="most=6"):
        thin(np.zeros(10), 6)


def test_which_value_is_the_worst() -> None:
    assert worst_of("attention_entropy", "") == "smallest"
    assert worst_of("activation", "min") == "smallest"
    assert worst_of("attention_max_logit", "") == "largest"
    assert worst_of("activation", "mean") == "farthest from zero"


# Scales


@settings(deadline=None)
@given(st.lists(anything, max_size=20), st.booleans())
@example([sys.float_info.max], False)
@example([-sys.float_info.max], True)
@example([sys.float_info.max, -sys.float_info.max], True)
@example([5e-324, sys.float_info.max], False)
@example([5e-324], False)
def test_scales_keep_the_order_and_hold_all_finite_values(
    numbers: list[float], linear: bool
) -> None:
    values = np.array(numbers, dtype=np.float64)
    scale = scale_for([values], linear=linear)
    assert scale.low < scale.high
    assert len(scale.ticks) == len(scale.labels) >= 2 or not numbers
    finite = np.sort(values[np.isfinite(values)])
    placed = scale.apply(finite)
    assert np.isfinite(placed).all()
    assert (np.diff(placed) >= 0).all()
    slack = 1e-9 * abs(scale.low) + 1e-9 * abs(scale.high)
    assert np.isfinite([scale.low, scale.high, *scale.ticks]).all()
    for places in (placed, np.array(scale.ticks)):
        # Divided first: one unit beyond the largest number would be infinite.
        assert (places / 2 >= scale.low / 2 - slack / 2).all()
        assert (places / 2 <= scale.high / 2 + slack / 2).all()


def test_magnitudes_are_logarithmic_and_zero_is_apart() -> None:
    scale = scale_for([np.array([0.0, 1e-6, 1.0, math.nan])])
    assert scale.kind == "log"
    assert (scale.labels[0], scale.ticks[0]) == ("0", scale.low)
    assert scale.low < -6
    places = scale.apply(np.array([0.0, 1e-6, 1.0]))
    assert places.tolist() == pytest.approx([scale.low, -6, 0])


def test_signs_are_symmetric() -> None:
    scale = scale_for([np.array([-100.0, 0.001, 5.0])])
    assert scale.kind == "symmetric"
    assert scale.low == -scale.high
    left, zero, right = scale.apply(np.array([-5.0, 0.0, 5.0]))
    assert (zero, left) == (0, -right)


def test_what_hardly_differs_looks_so() -> None:
    scale = scale_for([np.array([1.9193, 1.91934])])
    assert scale.kind == "linear"
    assert scale.high - scale.low == pytest.approx(1.91934e-3, rel=1e-3)
    assert len(set(scale.labels)) == len(scale.labels)


# Groups


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("activation/h.0.mlp/rms", "h.0.mlp"),
        ("activation/h.0.attn[0]/rms", "h.0.attn"),
        ("activation/[root module][loss]/rms", "[root module]"),
        ("activation/h.0.attn.head_3.query/rms", "h.0.attn"),
        ("activation/heads.query/rms", "heads.query"),
        ("attention_entropy/h.0.attn.call_1.head_2", "h.0.attn"),
        ("attention_entropy/h.0.attn", "h.0.attn"),
        ("gradient/h.0.mlp.weight/norm", "h.0.mlp"),
        ("parameter/scale/rms", "[root module]"),
        ("RCC (W_t-W_0)x_t/h.0.mlp.weight/l2norm", "h.0.mlp"),
        ("step/gradient_norm/h.0", "h.0"),
        *[("step/gradient_norm", ""), ("system/cpu_percent", ""), ("train/loss", "")],
    ],
)
def test_the_layer_of_a_key(key: str, layer: str) -> None:
    assert layer_of(info_of(key)) == layer


def test_groups_go_from_the_input_to_the_output(tmp_path: Path) -> None:
    with of_layers(tmp_path) as run:
        groups, others = group_keys(run, run.keys())
    assert others == ["loss"]
    assert {group.name: group.labels for group in groups} == {
        "activation/rms": ("embed", "blocks.0", "blocks.1", "head"),
        "activation/mean": ("embed", "blocks.0", "blocks.1", "head"),
        "gradient/norm": ("embed.weight", "head.weight"),
    }


# Figures


def test_lines_break_where_a_series_is_not_finite_and_mark_it(tmp_path: Path) -> None:
    with of_layers(tmp_path) as run:
        plot = run.plot(r"activation/blocks\.\d/rms")
    lines = [trace for trace in plot.data if trace.yaxis is None]
    marks = [trace for trace in plot.data if trace.yaxis == "y2"]
    assert [line.name for line in lines] == ["activation/blocks.0/rms", "activation/blocks.1/rms"]
    assert [np.flatnonzero(np.isnan(line.y)).tolist() for line in lines] == [[9], [7]]
    assert [(list(mark.x), mark.marker.color) for mark in marks] == [
        ([9], INFINITY_COLOUR),
        ([7], NAN_COLOUR),
    ]
    assert plot.layout.yaxis.type == "log"


def test_what_a_logarithmic_axis_cannot_show_is_marked(tmp_path: Path) -> None:
    values = [1.0, 0.0, -3.0, 2.0, 4.0, math.nan]
    with recorded(tmp_path, {step: {"x": value} for step, value in enumerate(values)}) as run:
        line, nan, others = run.plot("x", log=True).data
        assert len(run.plot("x", log=False).data) == 2
    assert np.flatnonzero(np.isnan(line.y)).tolist() == [1, 2, 5]
    assert (list(nan.x), list(others.x), list(others.text)) == ([5], [1, 2], ["0", "-3"])


def test_without_a_pattern_lines_are_losses(tmp_path: Path) -> None:
    with of_layers(tmp_path) as run:
        assert [trace.name for trace in run.plot().data] == ["loss"]
        assert run.plot(log=False).layout.yaxis.type == "linear"


def test_long_lines_are_thinned_and_say_so(tmp_path: Path) -> None:
    values = np.sin(np.arange(4500.0))
    values[3456] = 40.0
    with recorded(tmp_path, {step: {"x": float(v)} for step, v in enumerate(values)}) as run:
        plot = run.plot("x")
    (line,) = plot.data
    assert 2000 < len(line.x) <= 4000
    assert dict(zip(line.x, line.y, strict=True))[3456] == 40
    assert "4,500 steps drawn by" in plot.layout.title.text


def test_a_heat_map_has_layers_as_rows_and_names_what_is_not_finite(tmp_path: Path) -> None:
    with of_layers(tmp_path) as run:
        plot = run.plot("activation/.*/(rms|mean)$", kind="heatmap")
        rms = run.table([f"activation/{name}/rms" for name in plot.data[0].y])[1]
    values, strange, mean = plot.data
    assert list(values.y) == ["embed", "blocks.0", "blocks.1", "head"]
    finite = np.isfinite(rms)
    np.testing.assert_allclose(values.z[finite], np.log10(rms[finite]))
    np.testing.assert_array_equal(np.isnan(values.z), ~finite)
    assert np.argwhere(strange.z == 0).tolist() == [[2, 7]]
    assert np.argwhere(strange.z == 1).tolist() == [[1, 9]]
    assert mean.zmin == -mean.zmax or mean.z.max() <= mean.zmax
    assert [note.text for note in plot.layout.annotations] == ["activation/rms", "activation/mean"]


def test_a_long_heat_map_is_reduced_and_says_so(tmp_path: Path) -> None:
    records = {step: {"activation/a/rms": 1.0, "activation/b/rms": 2.0} for step in range(1000)}
    records[501]["activation/a/rms"] = 7.0
    records[777]["activation/b/rms"] = math.nan
    with recorded(tmp_path, records) as run:
        plot = run.plot("activation", kind="heatmap")
    heat, strange = plot.data
    assert heat.z.shape == (2, 400)
    assert np.nanmax(heat.customdata) == 7
    assert np.isnan(heat.z).sum() == (~np.isnan(strange.z)).sum() == 1
    assert "1,000 steps shown as 400 columns: each shows the largest" in plot.layout.title.text


def test_depth_is_drawn_at_the_first_the_middle_and_the_last_step(tmp_path: Path) -> None:
    with of_layers(tmp_path, steps=19) as run:
        plot = run.plot("activation/.*/rms", kind="depth")
        rows = {step: run.at(step) for step in (0, 9, 18)}
    lines = [trace for trace in plot.data if "not drawn" not in trace.name]
    assert [line.name for line in lines] == ["step 0", "step 9", "step 18"]
    for line, values in zip(lines, rows.values(), strict=True):
        expected = [values[f"activation/{layer}/rms"] for layer in line.x]
        finite = [v if math.isfinite(v) else math.nan for v in expected]  # type: ignore[arg-type]
        np.testing.assert_array_equal(line.y, finite)
    (mark,) = [trace for trace in plot.data if "not drawn" in trace.name]
    assert list(mark.x) == ["blocks.0"]


@pytest.mark.parametrize(
    ("pattern", "kind", "words"),
    [
        ("loss", "bars", "kind='bars' is none of 'lines', 'heatmap', 'depth'"),
        ("(", "lines", r"pattern '\(' is no regular expression"),
        ("norm", "lines", r"matches pattern='norm' from its beginning.*gradient/embed.weight/norm"),
        ("acitvation/embed/rms", "lines", "nearest: .*'activation/embed/rms'"),
        ("loss", "heatmap", "'loss' belongs to no layer.*kind=\"lines\""),
        ("loss", "depth", "'loss' belongs to no layer"),
    ],
)
def test_errors_name_the_argument_and_the_fix(
    tmp_path: Path, pattern: str, kind: Any, words: str
) -> None:
    with of_layers(tmp_path) as run, pytest.raises(ValueError, match=words):
        run.plot(pattern, kind)


def test_too_many_panels_are_refused(tmp_path: Path) -> None:
    values = {f"activation/a/metric_{place}": 1.0 for place in range(13)}
    with recorded(tmp_path, {0: values}) as run, pytest.raises(ValueError, match="13 metrics"):
        run.plot(kind="heatmap")


def test_without_plotly_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmm.views.plots.style.find_spec", lambda name: None)
    with (
        of_layers(tmp_path) as run,
        pytest.raises(ImportError, match=r"pip install 'tmm-compile\[plot\]'"),
    ):
        figure(run)


def test_figures_as_files(tmp_path: Path) -> None:
    with of_layers(tmp_path / "run") as run:
        for kind in ("lines", "heatmap", "depth"):
            path = tmp_path / f"{kind}.html"
            arguments = ["plot", str(tmp_path / "run"), "activation/.*", "--kind", kind]
            result = CliRunner().invoke(app, [*arguments, "-o", str(path)])
            assert result.exit_code == 0, result.output
            assert '"showSendToCloud": false' in path.read_text()
        with pytest.raises(ValueError, match="write a .html"):
            write_figure(run.plot(), tmp_path / "x.doc")
    result = CliRunner().invoke(app, ["plot", str(tmp_path / "run"), "loss", "--kind", "depth"])
    assert result.exit_code == 1
    assert "give --output" in result.output


# Notebooks


def test_a_run_shows_itself(tmp_path: Path) -> None:
    with of_layers(tmp_path) as run:
        shown = run._repr_html_()
    assert "tmm run a &lt;run&gt;" in shown
    assert "20, from 0 to 19" in shown
    assert "8 activation, 2 gradient, 1 logged" in shown
    assert "0.05 at step 19" in shown
    assert "<script" not in shown
    with RunWriter(tmp_path / "empty", info={}):
        pass
    with tmm.open_run(tmp_path / "empty") as run:
        assert "empty" in run._repr_html_()


def test_an_explanation_shows_itself() -> None:
    import torch

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.long()

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Odd())
    tmm.instrument(model, tmm.Spec(tmm.activation("rms")))
    with tmm.monitor(model).step(0):
        model(torch.randn(2, 2))
    shown = tmm.explain(model)._repr_html_()
    assert "1 of 3" in shown
    assert "not measured: 2" in shown
    assert "activation/0: rms" in shown
    assert "http" not in shown
