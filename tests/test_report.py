"""The page of a report, in a real browser."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tmm
from tests.browser import errors, open_browser, show_as
from tests.lazily import Lazily
from tmm.cli import app
from tmm.cli.demo_training import TrainingSettings, train
from tmm.core.keys import info_of
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.examples.gpt import GPT, GPTConfig
from tmm.runs.catalog import find_run
from tmm.runtime.store.run_writer import RunWriter
from tmm.views.report import report_page, write_report
from tmm.views.report.blocks import four_digits

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

webdriver = Lazily("selenium.webdriver")
by, ui = Lazily("selenium.webdriver.common.by"), Lazily("selenium.webdriver.support.ui")
HOSTILE = "</script><script>window.executed = true</script><img src=x onerror='executed = true'>"
NAN, INF = math.nan, math.inf
SECONDS = 30


# Runs


def written(folder: Path, series: Mapping[str, Any]) -> Path:
    """A run that holds ``series``, one value per step of each key."""
    infos = tuple(info_of(key, position) for position, key in enumerate(series))
    values = np.array(list(series.values()), dtype=np.float64).reshape(len(infos), -1)
    return recorded(folder, infos, values.T)


def recorded(folder: Path, infos: tuple[KeyInfo, ...], rows: Any) -> Path:
    with RunWriter(folder, info={"id": folder.name, "name": folder.name}) as writer:
        for step, row in enumerate(np.asarray(rows)):
            writer.submit(StepRecord(step, (Table(infos, row),)))
    return folder


def trained(
    root: Path, name: str, *, learning_rate: float = 1e-3, broken_at: int | None = None
) -> Path:
    """A small GPT with attention, gradients, updates and the coordinate check monitored."""
    torch.manual_seed(0)
    module = GPT(GPTConfig(vocabulary=32, context=16, layers=2, heads=2, width=16))
    spec = tmm.Spec(
        tmm.activation("rms", "absmax", "nan_count"),
        tmm.activation_gradient("rms"),
        tmm.gradient("norm"),
        tmm.update("relative_norm"),
        tmm.attention("entropy", "max_logit"),
        tmm.rcc(),
        every=2,
        reference="init",
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)
    with tmm.start_run("gpt", name, root=root, config={"lr": learning_rate, "seed": 0}) as run:
        model = run.watch(torch.compile(module, backend="eager"), spec, optimizer=optimizer)
        generator = torch.Generator().manual_seed(1)
        for step in range(24):
            if step == broken_at:
                module.h[1].mlp.c_fc.weight.data[0, 0] = NAN
            tokens = torch.randint(32, (4, 17), generator=generator).sort(dim=1).values
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log({"loss": loss, "accuracy": (logits.argmax(-1) == tokens[:, 1:]).float().mean()})
            run.step(tokens=tokens.numel())
    return run.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        "steady": trained(root, "steady"),
        "hot": trained(root, "hot", learning_rate=0.1),
        "broken": trained(root, "broken", broken_at=10),
    }


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of single runs, and one of all of them."""
    folder = tmp_path_factory.mktemp("pages")
    of = {"steady": ["steady"], "broken": ["broken"], "all": list(runs)}
    return {
        name: write_report([find_run(runs[run]) for run in chosen], folder / f"{name}.html")
        for name, chosen in of.items()
    }


# The page


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with open_browser() as chrome:
        chrome.execute_cdp_cmd("Network.enable", {})
        yield chrome
        chrome.get("about:blank")


@pytest.fixture(autouse=True)
def nothing_goes_wrong_and_nothing_is_loaded(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "browser" in request.fixturenames:
        chrome = request.getfixturevalue("browser")
        assert errors(chrome) == []
        loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        assert chrome.execute_script(loaded) == []


def opened(
    chrome: Chrome, folder: Path, *paths: Path, scheme: str = "light", width: int = 1280
) -> Path:
    page = write_report([find_run(path) for path in paths], folder / "report.html")
    show(chrome, page, scheme, width)
    return page


def show(chrome: Chrome, page: Path, scheme: str = "light", width: int = 1280) -> None:
    show_as(chrome, scheme, width, 900)
    chrome.get(page.as_uri())
    until(chrome, lambda: chrome.execute_script("return document.documentElement.dataset.shown"))


def until(chrome: Chrome, condition: Callable[[], Any]) -> Any:
    return ui.WebDriverWait(chrome, SECONDS, 0.05).until(lambda _: condition())


def all_of(chrome: Chrome, selector: str) -> list[WebElement]:
    return chrome.find_elements(by.By.CSS_SELECTOR, selector)


def one(chrome: Chrome, selector: str) -> WebElement:
    return chrome.find_element(by.By.CSS_SELECTOR, selector)


def drawn(chrome: Chrome, selector: str) -> WebElement:
    """The plot in the element that ``selector`` finds, once it is drawn."""
    chrome.execute_script(
        "document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector
    )
    until(chrome, lambda: all_of(chrome, f"{selector} .plot[data-drawn]"))
    return one(chrome, f"{selector} .plot")


def click(chrome: Chrome, what: WebElement) -> None:
    """Click where the bar at the top of the page does not cover it."""
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", what)
    what.click()


def traces(chrome: Chrome, plot: WebElement) -> list[dict[str, Any]]:
    """What a plot draws; NaN, which JSON lacks, as None."""
    script = """
        const plain = (v) => ArrayBuffer.isView(v) ? Array.from(v).map(plain)
          : Array.isArray(v) ? v.map(plain)
          : typeof v === "number" && !Number.isFinite(v) ? null : v;
        return JSON.stringify(arguments[0].data.map((t) => ({
          type: t.type, mode: t.mode, x: plain(t.x), y: plain(t.y), z: plain(t.z), name: t.name,
          yaxis: t.yaxis, text: t.text, customdata: t.customdata?.length})));
    """
    found: list[dict[str, Any]] = json.loads(chrome.execute_script(script, plot))
    return found


def cards(chrome: Chrome) -> dict[str, str]:
    return {
        card.find_element(by.By.CSS_SELECTOR, ".what").text: card.find_element(
            by.By.CSS_SELECTOR, ".value"
        ).text
        for card in all_of(chrome, ".card")
    }


def sections(chrome: Chrome) -> list[str]:
    return [str(found.get_dom_attribute("id")) for found in all_of(chrome, "main > section")]


def fits(chrome: Chrome, width: int) -> bool:
    return int(chrome.execute_script("return document.documentElement.scrollWidth")) <= width


def click_cell(chrome: Chrome, plot: WebElement, row: int, column: int) -> None:
    """Move to the middle of a cell of a heat map, and click."""
    script = """
        const [plot, row, column] = arguments;
        const {xaxis, yaxis} = plot._fullLayout;
        const box = plot.getBoundingClientRect();
        const x = box.left + xaxis._offset + xaxis.d2p(column);
        const y = box.top + yaxis._offset + yaxis.d2p(row);
        return [Math.round(x), Math.round(y)];
    """
    x, y = chrome.execute_script(script, plot, row, column)
    actions = webdriver.ActionChains(chrome)
    actions.w3c_actions.pointer_action.move_to_location(x, y)
    actions.w3c_actions.pointer_action.pause(0.3)
    actions.perform()
    until(chrome, lambda: not one(chrome, "#tip").get_property("hidden"))
    webdriver.ActionChains(chrome).click().perform()


def test_the_report_of_a_real_run(
    browser: Chrome, runs: dict[str, Path], pages: dict[str, Path]
) -> None:
    show(browser, pages["steady"])
    shown = cards(browser)
    with tmm.open_run(runs["steady"]) as run:
        losses = run.series("loss")[1]
        rates = run.series("system/tokens_per_second")[1]
        rms = run.table(run.keys(r"activation/[^/]*/rms$"))[1]
    assert shown["Status"] == "finished"
    assert shown["Recorded steps"] == "24"
    assert float(shown["Last loss"]) == pytest.approx(losses[-1], rel=1e-3)
    assert float(shown["Throughput"].replace(",", "")) == pytest.approx(np.median(rates), rel=1e-3)
    assert shown["First not finite"] == "none"
    wanted = {"loss", "layers", "gradients", "updates", "attention", "rcc", "logged", "settings"}
    assert wanted <= set(sections(browser))
    (line,) = traces(browser, drawn(browser, "#loss .chart"))[:1]
    assert line["y"] == losses.tolist()
    # The heat map shows what was recorded, on its logarithmic scale.
    heat, *_ = traces(browser, drawn(browser, "#layers .panel"))
    assert np.array(heat["z"]).shape == (len(rms), 12)
    scale = browser.execute_script("return data.groups['activation/rms'].scale")
    assert scale["kind"] == "log"
    places = sorted(np.log10(rms[:, ::2].ravel()))
    assert sorted(np.ravel(heat["z"])) == pytest.approx(places, abs=1e-4)
    for name in ("gradients", "updates", "attention", "rcc"):
        assert traces(browser, drawn(browser, f"#{name} .panel"))
    titles = browser.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map((made) => made.dataset.title)"
    )
    assert {"Zoom", "Pan"} <= set(titles)
    assert not any("share" in title.lower() for title in titles)


def test_a_cell_opens_its_layer_and_the_layer_its_metrics(
    browser: Chrome, runs: dict[str, Path], pages: dict[str, Path]
) -> None:
    show(browser, pages["steady"])
    plot = drawn(browser, "#layers .panel")
    labels = browser.execute_script(
        "return data.blocks.find((block) => block.group === 'activation/rms').labels"
    )
    row = labels.index("h.0.mlp.c_fc")
    click_cell(browser, plot, row, 3)
    until(browser, lambda: one(browser, "#layer-name").text == "h.0.mlp.c_fc")
    assert "step 6 marked" in one(browser, "#layer-lead").text
    keys = [str(chart.get_dom_attribute("data-key")) for chart in all_of(browser, "#layer .chart")]
    with tmm.open_run(runs["steady"]) as run:
        mine = [key for key in run.keys() if re.search(r"/h\.0\.mlp\.c_fc(\.weight|\.bias)?/", key)]  # noqa: SIM118
        assert sorted(keys) == sorted(mine)
        key = "activation/h.0.mlp.c_fc/rms"
        steps, values = run.series(key)
    (line, *_) = traces(browser, drawn(browser, f'#layer .chart[data-key="{key}"]'))
    assert line["x"] == steps.tolist()
    assert line["y"] == pytest.approx(values.tolist(), rel=1e-4)
    browser.switch_to.active_element.send_keys(webdriver.Keys.ESCAPE)
    until(browser, lambda: not all_of(browser, "#layer[open]"))
    assert not all_of(browser, "#layer .chart")


def test_a_nan_is_said_first_marked_and_leads_to_its_layer(
    browser: Chrome, runs: dict[str, Path], pages: dict[str, Path]
) -> None:
    show(browser, pages["broken"])
    shown = cards(browser)
    with tmm.open_run(runs["broken"]) as run:
        first = tmm.analysis.first_nonfinite(run)
        count = len(tmm.analysis.find_anomalies(run))
    assert first is not None
    assert (first.step, first.site) == (10, "h.1.mlp.c_fc")
    assert shown["First not finite"] == "step 10"
    assert shown["Last loss"] == "NaN"
    assert "1 critical" in shown["Anomalies"]
    assert sum(browser.execute_script("return Object.values(data.runs[0].anomalies)")) == count
    top = until(browser, lambda: all_of(browser, "#findings .finding"))[0]
    assert first.text in top.text
    loss, strange, *marks = traces(browser, drawn(browser, "#loss .chart"))
    assert loss["y"][:10] == [value for value in loss["y"] if value is not None]
    assert (strange["x"], strange["yaxis"]) == (list(range(10, 24)), "y2")
    assert any(mark["customdata"] and 10 in mark["x"] for mark in marks)
    heat, red, *_ = traces(browser, drawn(browser, "#layers .panel"))
    reds = np.array([[value is not None for value in row] for row in red["z"]])
    blank = np.array([[value is None for value in row] for row in heat["z"]])
    assert (reds == blank).all()
    assert reds[:, 6:].all()
    assert not reds[:, :5].any()
    labels = browser.execute_script(
        "return data.blocks.find((block) => block.group === 'activation/rms').labels"
    )
    assert next(name for name, bad in zip(labels, reds[:, 5], strict=True) if bad) == first.site
    click(browser, top)
    until(browser, lambda: one(browser, "#layer-name").text == "h.1.mlp.c_fc")
    assert first.text in one(browser, "#layer-body").text
    one(browser, "#layer-close").click()
    # Groups of many are folded, and open on a click.
    folded = next(g for g in all_of(browser, "#findings .group") if "\u00d7" in g.text)
    assert not folded.find_elements(by.By.CSS_SELECTOR, ".finding")
    click(browser, folded.find_element(by.By.CSS_SELECTOR, "summary"))
    until(browser, lambda: folded.find_elements(by.By.CSS_SELECTOR, ".finding"))


def test_a_mark_on_a_curve_opens_the_layer(browser: Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["broken"])
    plot = drawn(browser, "#loss .chart")
    script = """
        const plot = arguments[0];
        for (const [i, trace] of plot.data.entries()) {
          if (trace.name !== "anomaly") continue;
          const j = trace.customdata.findIndex((anomaly) => anomaly.layer);
          if (j < 0) continue;
          const point = {customdata: trace.customdata[j], x: trace.x[j], y: trace.y[j]};
          plot.emit("plotly_click", {points: [point]});
          return trace.customdata[j].layer;
        }
    """
    layer = browser.execute_script(script, plot)
    until(browser, lambda: one(browser, "#layer-name").text == layer != "")


def test_views_metrics_and_filters_of_a_panel(
    browser: Chrome, runs: dict[str, Path], pages: dict[str, Path]
) -> None:
    show(browser, pages["steady"])
    panel = "#layers .panel"
    drawn(browser, panel)
    with tmm.open_run(runs["steady"]) as run:
        layers = len(run.keys(r"activation/[^/]*/rms$"))
    assert one(browser, panel).get_dom_attribute("data-rows") == str(layers)
    click(browser, one(browser, f"{panel} [data-view=lines]"))
    until(browser, lambda: traces(browser, drawn(browser, panel))[0].get("mode"))
    assert "24 of" in one(browser, f"{panel} .note").text
    click(browser, one(browser, f"{panel} [data-view=depth]"))
    until(browser, lambda: traces(browser, drawn(browser, panel))[0].get("name") == "step 0")
    assert traces(browser, drawn(browser, panel))[-1]["name"] == "step 22"
    one(browser, f"{panel} input").send_keys("MLP h.1")
    until(browser, lambda: one(browser, panel).get_dom_attribute("data-rows") == "5")
    one(browser, f"{panel} input").send_keys("x")
    assert "No layer has such a name." in one(browser, f"{panel} .note").text


def test_compared_runs(browser: Chrome, runs: dict[str, Path], pages: dict[str, Path]) -> None:
    show(browser, pages["all"])
    table = one(browser, "#runs").text
    assert all(name in table for name in ("steady", "hot", "broken"))
    assert "step 10: h.1.mlp.c_fc" in table
    lines = traces(browser, drawn(browser, "#loss .chart"))
    assert {"steady", "hot", "broken"} <= {trace.get("name") for trace in lines}
    differences = one(browser, "#comparison").text
    with tmm.open_run(runs["steady"]) as a, tmm.open_run(runs["hot"]) as b:
        parting = tmm.analysis.first_divergence(a, b)
    assert parting is not None
    assert f"part at step {parting.step}, first in {parting.key}" in differences
    assert "0.001" in differences
    assert "seed" not in differences
    panel = "#layers .panel"
    drawn(browser, panel)
    assert len(traces(browser, drawn(browser, panel))) == 1
    choice = one(browser, f"{panel} select[aria-label=Run]")
    choice.send_keys("broken")
    until(browser, lambda: len(traces(browser, drawn(browser, panel))) > 1)
    browser.execute_script("openLayer('h.1.mlp')")
    until(browser, lambda: all_of(browser, "#layer[open] .plot[data-drawn]"))
    names = {trace.get("name") for trace in traces(browser, one(browser, "#layer .plot"))}
    assert {"steady", "hot", "broken"} <= names


def test_finding_a_layer_by_name(browser: Chrome, pages: dict[str, Path]) -> None:
    show(browser, pages["steady"])
    browser.switch_to.active_element.send_keys("/")
    box = browser.switch_to.active_element
    assert box.get_dom_attribute("id") == "search"
    key = "attention_entropy/h.1.attn.head_1"
    box.send_keys("head_1 Entropy h.1")
    until(browser, lambda: [b.text for b in all_of(browser, "#found button")] == [key])
    box.send_keys(webdriver.Keys.ENTER)
    until(browser, lambda: one(browser, "#layer-name").text == "h.1.attn")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        *((1280, "light"), (800, "dark")),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((1280, "dark"), (800, "light"))
        ),
    ],
)
def test_it_fits_its_window(
    browser: Chrome, tmp_path: Path, pages: dict[str, Path], scheme: str, width: int
) -> None:
    show(browser, pages["all"], scheme, width)
    for name in sections(browser):
        browser.execute_script("document.getElementById(arguments[0]).scrollIntoView()", name)
        plots = all_of(browser, f"#{name} .plot")
        if plots:
            first = f"#{name} .panel" if all_of(browser, f"#{name} .panel") else f"#{name} .chart"
            drawn(browser, first)
        assert browser.save_screenshot(str(tmp_path / f"{name}-{scheme}-{width}.png"))
    assert fits(browser, width)
    browser.execute_script("openLayer('h.0.mlp')")
    until(browser, lambda: all_of(browser, "#layer .plot[data-drawn]"))
    assert fits(browser, width)
    ground = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]"
    assert (int(browser.execute_script(ground)) < 128) == (scheme == "dark")
    one(browser, "#layer-close").click()
    click(browser, one(browser, "#theme"))
    assert (int(browser.execute_script(ground)) < 128) == (scheme == "light")


# Odd runs


def test_an_empty_run(browser: Chrome, tmp_path: Path) -> None:
    with tmm.start_run("p", "empty", root=tmp_path, system_seconds=None) as run:
        pass
    opened(browser, tmp_path, run.path)
    assert cards(browser)["Recorded steps"] == "0"
    assert one(browser, "#empty").text == "No step was recorded."
    assert sections(browser) == ["settings"]


def test_a_run_of_one_step_with_a_loss_only(browser: Chrome, tmp_path: Path) -> None:
    opened(browser, tmp_path, written(tmp_path / "short", {"loss": [2.5]}))
    assert cards(browser)["Last loss"] == "2.5"
    assert sections(browser) == ["loss", "settings"]
    (line,) = traces(browser, drawn(browser, "#loss .chart"))
    assert (line["x"], line["y"]) == ([0], [2.5])


def test_a_run_full_of_nan(browser: Chrome, tmp_path: Path) -> None:
    keys = [f"activation/layers.{layer}.{part}/rms" for layer in range(40) for part in "abcde"]
    keys += [f"gradient/layers.{layer}.a.weight/norm" for layer in range(40)]
    series = {key: np.full(30, NAN) for key in [*keys, "loss"]}
    series["activation/layers.7.c/rms"][:] = INF
    opened(browser, tmp_path, written(tmp_path / "nan", series))
    assert cards(browser)["First not finite"] == "step 0"
    assert one(browser, ".card.critical .more").text == "never finite"
    heat, red = traces(browser, drawn(browser, "#layers .panel"))[:2]
    assert {value for row in heat["z"] for value in row} == {None}
    assert red["z"][35 + 2] == [1] * 30
    assert sorted({value for row in red["z"] for value in row}) == [0, 1]
    assert len(traces(browser, drawn(browser, "#loss .chart"))[1]["x"]) == 30
    assert traces(browser, drawn(browser, "#gradients .panel"))


def test_a_run_that_is_running(browser: Chrome, tmp_path: Path) -> None:
    with tmm.start_run("p", "now", root=tmp_path, system_seconds=None) as run:
        for _ in range(3):
            run.log({"loss": 1.0})
            run.step()
        until_read = time.monotonic() + SECONDS
        while find_run(run.path).steps != 3 and time.monotonic() < until_read:
            time.sleep(0.05)
        opened(browser, tmp_path, run.path)
    assert cards(browser)["Status"] == "running"
    assert "more may follow" in one(browser, ".card .more").text


def test_text_is_shown_and_never_run(browser: Chrome, tmp_path: Path) -> None:
    layer = HOSTILE.replace(".", "_").replace("/", "\\")
    keys = (
        f"activation/{layer}/rms",
        f"activation/\"' ü \u2028 {layer}/rms",
        f"{HOSTILE}loss",
        "<b>bold</b>",
        "<!-- values -->/* data */",
    )
    with tmm.start_run(
        *("p", HOSTILE),
        root=tmp_path,
        config={HOSTILE: HOSTILE, "x": NAN, "deep": {"<i>": [HOSTILE]}},
        tags=[HOSTILE],
        notes=HOSTILE,
        system_seconds=None,
    ) as run:
        for value in (1.0, NAN):
            run.log(dict.fromkeys(keys[2:], value))
            run.step()
    infos = tuple(info_of(key, place) for place, key in enumerate(keys))
    other = recorded(tmp_path / "other", infos, [[1.0] * 5, [NAN] * 5, [2.0] * 5])
    opened(browser, tmp_path, run.path, other)
    drawn(browser, "#loss .chart")
    drawn(browser, "#layers .panel")
    shown = one(browser, "body").text
    assert shown.count(HOSTILE) >= 5
    assert "<b>bold</b>" in shown
    browser.execute_script("openLayer(data.blocks[0].layers[0], 1)")
    until(browser, lambda: all_of(browser, "#layer .plot[data-drawn]"))
    assert one(browser, "#layer-name").text == layer
    assert browser.execute_script("return window.executed") is None
    assert not all_of(browser, "img")


def test_a_segment_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "damaged", {"loss": [1.0, 0.5]})
    (segment,) = path.glob("*.h5")
    segment.write_bytes(segment.read_bytes()[:3000])
    result = CliRunner().invoke(app, ["report", str(path), "-o", str(tmp_path / "x.html")])
    assert result.exit_code == 1
    assert "damaged is broken" in result.output
    assert not (tmp_path / "x.html").exists()


def test_the_command(
    tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMM_ROOT", str(runs["hot"].parent.parent))

    def report(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == status, result.output
        return result.output

    output = tmp_path / "out.html"
    assert "wrote" in report("hot", "-o", str(output))
    assert output.stat().st_size > 1e6
    assert "no run 'cold'" in report("cold", "-o", str(output), status=1)
    assert "the same run twice" in report("hot", "hot", "-o", str(output), status=1)
    assert ".html" in report("hot", "-o", "out.pdf", status=1)
    monkeypatch.setattr("tmm.views.plots.style.find_spec", lambda name: None)
    assert "pip install 'tmm-compile[plot]'" in report("hot", "-o", str(output), status=1)


def test_numbers_of_four_digits_stay_finite_and_others_than_zero() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(10_000) * 10.0 ** generator.integers(-30, 30, 10_000)
    assert four_digits(values) == pytest.approx(values, rel=1e-4)
    odd = np.array([0.0, -0.0, 1e300, -1e300, 1e-300, -1e-300, 5e-324, NAN, 3.4028234e38])
    kept = four_digits(odd)
    assert (np.isfinite(kept) == np.isfinite(odd)).all()
    assert ((kept == 0) == (odd == 0)).all()
    assert (np.sign(kept[:-2]) == np.sign(odd[:-2])).all()


def test_a_report_needs_a_run() -> None:
    with pytest.raises(ValueError, match="needs a run"):
        report_page([])


@pytest.mark.slow
def test_the_report_of_the_demo(browser: Chrome, tmp_path: Path) -> None:
    small = GPTConfig(256, context=32, layers=2, width=32)
    settings = TrainingSettings(tmp_path / "demo", steps=20, every=2, backend="eager", model=small)
    train(settings, lambda _: None)
    opened(browser, tmp_path, settings.run)
    assert cards(browser)["Status"] == "finished"
    drawn(browser, "#loss .chart")
    drawn(browser, "#layers .panel")
    assert fits(browser, 1280)


@pytest.mark.slow
def test_a_large_run_opens_within_seconds(
    browser: Chrome, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    count, steps = 10_000, 5_000
    keys = [
        f"activation/blocks.{layer // 10}.part{layer % 10}/{metric}"
        for layer in range(count // 5)
        for metric in ("rms", "absmax", "mean", "std", "kurtosis")
    ]
    infos = tuple(info_of(key, place // 5) for place, key in enumerate(keys))
    generator = np.random.default_rng(0)
    rows = np.exp(generator.standard_normal((steps, count), dtype=np.float32)).astype(np.float64)
    rows[4000, 1235:1237] = NAN  # the rms and the largest value of one layer
    path = recorded(tmp_path / "large", infos, rows)
    start = time.perf_counter()
    page = write_report([find_run(path)], tmp_path / "report.html")
    record_property("seconds to build", round(time.perf_counter() - start, 1))
    start = time.perf_counter()
    show(browser, page)
    record_property("seconds to open", round(time.perf_counter() - start, 1))
    milliseconds = browser.execute_script("return document.documentElement.dataset.shown")
    record_property("seconds until shown, by the browser's clock", int(milliseconds) / 1000)
    plain = len(report_page([find_run(written(tmp_path / "small", {"loss": [1.0]}))]))
    megabytes = (page.stat().st_size - plain) / 1e6
    record_property("megabytes besides the library", round(megabytes, 1))
    assert megabytes < 15
    assert cards(browser)["First not finite"] == "step 4000"
    heat, red, *_ = traces(browser, drawn(browser, "#layers .panel"))
    assert len(red["z"]) == 2000
    assert sum(value is not None for row in red["z"] for value in row) == 1
    note = one(browser, "#layers .note").text
    assert f"5,000 steps shown as {len(heat['z'][0])} columns" in note
    assert "NaN and infinities win" in note


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="is not a record of tmm.list_runs"):
        write_report([tmp_path], tmp_path / "page.html")  # type: ignore[list-item]
    with pytest.raises(TypeError, match="is a path; give tmm.open_run"):
        tmm.analysis.find_anomalies(tmp_path)  # type: ignore[arg-type]
