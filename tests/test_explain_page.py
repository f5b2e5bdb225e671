"""The page of an explanation, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tmm
from tests.browser import REQUIRED, errors, open_browser, show_as
from tests.lazily import Lazily
from tmm.instrumentation.graph_report import GraphReport
from tmm.passes.graph.printer import NodeLine
from tmm.steps.explanation import Explanation, ModuleReport, RuleReport
from tmm.views.explain_page import page

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

webdriver, by = Lazily("selenium.webdriver"), Lazily("selenium.webdriver.common.by")
HOSTILE = "</script><script>window.executed = true</script><img src=x onerror='executed = true'>"


class Block(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        if self.broken:
            torch._dynamo.graph_break()
        tmm.record("hidden", hidden)
        output: torch.Tensor = x + self.down(hidden)
        return output


class Net(nn.Module):
    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(broken), Block(broken))
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.blocks(x))


def explained(model: nn.Module, *, run: bool = True) -> Explanation:
    spec = tmm.Spec(
        tmm.activation("rms", "max"), tmm.activation("mean", modules=r"blocks\.\d+\.up")
    )
    instrumented = tmm.instrument(model, spec)
    monitor = tmm.monitor(instrumented)
    if run:
        monitor.begin_step(0)
        instrumented(torch.randn(3, 8))
        monitor.end_step()
    return tmm.explain(instrumented)


def of_graphs(*graphs: GraphReport, modules: tuple[ModuleReport, ...] = ()) -> Explanation:
    return Explanation(
        modules=modules,
        rules=(),
        regions={},
        graphs=graphs,
        sites={},
        rows=sum(graph.rows for graph in graphs),
        recorded=(),
        eager={},
        unmeasured={},
    )


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with open_browser() as chrome:
        yield chrome
        chrome.get("about:blank")


def opened(chrome: Chrome, explanation: Explanation, folder: Path, scheme: str = "light") -> Path:
    path = explanation.to_html(folder / "explanation.html")
    show_as(chrome, scheme, 1400, 1000)
    chrome.get(path.as_uri())
    assert errors(chrome) == []
    return path


def all_of(chrome: Chrome, selector: str) -> list[WebElement]:
    return chrome.find_elements(by.By.CSS_SELECTOR, selector)


def text_of(chrome: Chrome, selector: str) -> str:
    return chrome.find_element(by.By.CSS_SELECTOR, selector).text


def shown_rows(chrome: Chrome, kind: str = "") -> list[str]:
    """What the shown rows hold, also those that are scrolled out of sight."""
    return [
        row.get_property("textContent")  # type: ignore[misc]
        for row in all_of(chrome, f"#rows > .row{kind}:not([hidden])")
    ]


def choose(chrome: Chrome, module: str) -> None:
    item = next(
        i for i in all_of(chrome, "[role=treeitem]") if i.get_dom_attribute("title") == module
    )
    item.find_element(by.By.CSS_SELECTOR, ".label").click()


def search(chrome: Chrome, text: str) -> None:
    box = chrome.find_element(by.By.ID, "search")
    box.clear()
    box.send_keys(text)


def test_page_of_a_whole_graph(browser: Chrome, tmp_path: Path) -> None:
    explanation = explained(compiled(Net()))
    path = opened(browser, explanation, tmp_path)
    (graph,) = explanation.graphs

    items = all_of(browser, "[role=treeitem]")
    assert [i.get_dom_attribute("title") for i in items] == [m.name for m in explanation.modules]
    badges = [badge.text for badge in all_of(browser, ".tree .badge")]
    assert badges == [module.measured or "none" for module in explanation.modules]
    assert "norm" in items[3].text
    assert "LayerNorm" in items[3].text
    assert "rms, max" in items[3].text

    overview = text_of(browser, "#overview")
    assert "12 of 12 modules" in overview
    assert "2 of 12 modules" in overview
    assert "backend='eager'" in overview
    assert "hidden" in overview
    totals = dict(
        zip(
            [term.text for term in all_of(browser, "#totals dt")],
            [value.text for value in all_of(browser, "#totals dd")],
            strict=True,
        )
    )
    assert totals["rows in a step"] == str(explanation.rows)
    assert totals["extra outputs"] == str(graph.outputs)
    assert totals["in extra outputs"] == f"{graph.bytes} B"

    inserted = [node for node in graph.after if node.inserted_by]
    rows = shown_rows(browser, ".inserted")
    assert len(rows) == len(inserted) > 0
    for row, node in zip(rows, inserted, strict=True):
        assert node.text in row
        assert node.inserted_by in row
        for label in node.measures:
            assert label.replace("[this module]", "[root module]") in row
    both = all_of(browser, "#rows > .row:not(.inserted) > .before")
    assert [cell.text for cell in both] == [node.text for node in graph.before]
    after = all_of(browser, "#rows > .row > .after code")
    assert [cell.text for cell in after] == [node.text for node in graph.after]
    assert not all_of(browser, "#tabs button:not([hidden])")[1:]
    assert re.search(r"(src|href)=|url\(|https?:", path.read_text()) is None


def test_search_counts_and_filters(browser: Chrome, tmp_path: Path) -> None:
    explanation = explained(compiled(Net()))
    opened(browser, explanation, tmp_path)
    (graph,) = explanation.graphs
    every = len(shown_rows(browser))
    for text in ("LAYER_NORM", "detach_1", "blocks.1.up", "pack_rows", "relu tensor_1", "nowhere"):
        search(browser, text)
        rows = shown_rows(browser)
        assert text_of(browser, "#count") == f"{len(rows)} of {every} nodes"
        for row in rows:
            assert all(word in row.lower() for word in text.lower().split())
    assert text_of(browser, "#nothing") == "No node of this graph matches."

    def count(text: str) -> int:
        search(browser, text)
        return len(shown_rows(browser))

    assert count("layer_norm(") == 2
    assert count("pack_rows") == sum(node.inserted_by == "pack_rows" for node in graph.after)
    assert count("insert_reductions detach") == 22
    search(browser, "x" + webdriver.Keys.BACKSPACE)
    assert len(shown_rows(browser)) == every
    browser.find_element(by.By.ID, "changes").click()
    assert len(shown_rows(browser)) == 1 + sum(bool(node.inserted_by) for node in graph.after)


def test_a_module_shows_its_nodes(browser: Chrome, tmp_path: Path) -> None:
    explanation = explained(compiled(Net()))
    opened(browser, explanation, tmp_path)
    (graph,) = explanation.graphs
    every = len(shown_rows(browser))

    def expected(name: str) -> list[str]:
        measured = f"activation/{name}"
        return [
            node.text
            for node in graph.after
            if re.match(re.escape(name) + r"(\.|$)", node.module)
            or any(re.match(re.escape(measured) + r"(\.|$)", label) for label in node.measures)
        ]

    for name in ("blocks.0.up", "blocks.1"):
        choose(browser, name)
        assert text_of(browser, "#selected") == name
        rows = shown_rows(browser, ".belongs")
        texts = [cell.text for cell in all_of(browser, ".belongs:not([hidden]) > .after code")]
        assert texts == expected(name)
        assert len(shown_rows(browser)) == len(rows)
    browser.find_element(by.By.ID, "only").click()
    assert len(shown_rows(browser)) == every
    assert shown_rows(browser, ".belongs") == rows
    browser.find_element(by.By.ID, "clear").click()
    assert shown_rows(browser, ".belongs") == []


def test_several_graphs_after_breaks(browser: Chrome, tmp_path: Path) -> None:
    explanation = explained(compiled(Net(broken=True)))
    opened(browser, explanation, tmp_path)
    tabs = all_of(browser, "#tabs [role=tab]")
    assert len(tabs) == len(explanation.graphs) > 2
    assert "graph break" in text_of(browser, "#overview")
    for tab, graph in zip(tabs, explanation.graphs, strict=True):
        tab.click()
        assert tab.get_dom_attribute("aria-selected") == "true"
        assert f"Graph {graph.index} of {graph.owner} with" in text_of(browser, "#about")
        assert " ".join(graph.ended_by.split()) in text_of(browser, "#about")
        inserted = [node.text for node in graph.after if node.inserted_by]
        cells = all_of(browser, "#rows > .inserted code")
        assert [cell.text for cell in cells] == inserted
    # Nodes have names relative to the frame; the module leads to the graph that holds them.
    choose(browser, "blocks.1.up")
    owner, rows = text_of(browser, "#about"), shown_rows(browser, ".belongs")
    assert "of blocks.1 " in owner
    assert any("activation/blocks.1.up" in row for row in rows)


def test_a_module_that_shares_the_graph_of_an_equal_one(browser: Chrome, tmp_path: Path) -> None:
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager")
    explanation = explained(model)
    graphs = tuple(graph for graph in explanation.graphs if graph.owner == "blocks.0")
    assert graphs
    explanation = replace(explanation, graphs=graphs)
    opened(browser, explanation, tmp_path)
    choose(browser, "blocks.1.up")
    assert shown_rows(browser) == []
    browser.find_element(by.By.CSS_SELECTOR, "#counterpart button").click()
    assert text_of(browser, "#selected") == "blocks.0.up"
    assert shown_rows(browser, ".belongs")
    choose(browser, "unused")
    assert text_of(browser, "#counterpart") == ""


def test_keyboard(browser: Chrome, tmp_path: Path) -> None:
    opened(browser, explained(compiled(Net(broken=True))), tmp_path)

    def press(key: str) -> WebElement:
        browser.switch_to.active_element.send_keys(key)
        return browser.switch_to.active_element

    browser.execute_script("document.querySelector('[role=treeitem]').focus()")
    assert press(webdriver.Keys.ARROW_DOWN).get_dom_attribute("title") == "blocks"
    assert press(webdriver.Keys.ARROW_LEFT).get_dom_attribute("aria-expanded") == "false"
    assert press(webdriver.Keys.ARROW_DOWN).get_dom_attribute("title") == "head"
    press(webdriver.Keys.ENTER)
    assert text_of(browser, "#selected") == "head"
    assert press("/").get_dom_attribute("id") == "search"
    all_of(browser, "#tabs button")[0].click()
    assert press(webdriver.Keys.ARROW_RIGHT).get_dom_attribute("aria-selected") == "true"
    assert text_of(browser, "#about").startswith("Graph 1 ")


def test_without_graphs(browser: Chrome, tmp_path: Path) -> None:
    opened(browser, explained(compiled(Net()), run=False), tmp_path)
    assert "has not run in a monitored step" in text_of(browser, "#no-graphs")
    assert len(all_of(browser, "[role=treeitem]")) == 12
    choose(browser, "head")
    assert errors(browser) == []

    eager = ModuleReport("[root module]", "Net", ("rms",), "eager")
    opened(browser, of_graphs(modules=(eager,)), tmp_path)
    assert "every module that was measured ran eagerly" in text_of(browser, "#no-graphs")
    assert "Nothing is compiled." in text_of(browser, "#overview")


def test_text_is_shown_and_never_run(browser: Chrome, tmp_path: Path) -> None:
    name = HOSTILE.replace(".", "_")
    node = NodeLine(f"%x = f('{HOSTILE}')", name, "a <b>pass</b>", (f"activation/{name}",))
    graph = GraphReport(name, HOSTILE, (), (node,), "", 1, 1, 8, {HOSTILE: 0.1}, HOSTILE)
    root = ModuleReport("[root module]", HOSTILE, (), "")
    module = ModuleReport(name, HOSTILE, (HOSTILE,), "graph and eager")
    explanation = Explanation(
        modules=(root, module),
        rules=(RuleReport(HOSTILE, "modules", (name,)),),
        regions={name: HOSTILE},
        graphs=(graph, replace(graph, index=1)),
        sites={},
        rows=1,
        recorded=(HOSTILE, "/* script */"),
        eager={name: HOSTILE},
        unmeasured={f"{name}[0]": HOSTILE},
    )
    opened(browser, explanation, tmp_path)
    choose(browser, name)
    shown = text_of(browser, "body")
    assert shown.count(HOSTILE) >= 8
    assert shown.count(name) >= 5
    assert "a <b>pass</b>" in shown
    assert browser.execute_script("return window.executed") is None
    assert not all_of(browser, "img")
    assert [badge.text for badge in all_of(browser, ".badge")] == ["none", "both"]
    assert errors(browser) == []


def test_a_large_graph_stays_usable(browser: Chrome, tmp_path: Path) -> None:
    names = [f"layers.{index // 10}.part{index % 10}" for index in range(5000)]
    before = tuple(
        NodeLine(f"%x_{i}: float32[8, 8] = torch.relu(%x_{i - 1})", name)
        for i, name in enumerate(names)
    )
    after = []
    for index, node in enumerate(before):
        after.append(node)
        if index % 2:
            text = f"%s_{index} = torch.ops.tmm.summarize.default(%x_{index})"
            after.append(NodeLine(text, "", "insert_reductions", (f"activation/{node.module}",)))
    graph = GraphReport("[root module]", "", before, tuple(after), "", 2500, 1, 80000, {})
    parents = [f"layers.{index}" for index in range(500)]
    modules = [ModuleReport(n, "Part", (), "graph") for n in ("[root module]", "layers", *parents)]
    modules += [ModuleReport(name, "Part", ("rms",), "graph") for name in names]
    opened(browser, of_graphs(graph, modules=tuple(modules)), tmp_path)
    seconds = browser.execute_script("return performance.now()") / 1000
    assert seconds < 20, "the page took too long to show"
    search(browser, "part7")
    assert text_of(browser, "#count") == "1,000 of 7,500 nodes"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 1400), ("light", 420)])
def test_it_fits_its_window(browser: Chrome, tmp_path: Path, scheme: str, width: int) -> None:
    opened(browser, explained(compiled(Net(broken=True))), tmp_path, scheme)
    show_as(browser, scheme, width, 900)
    script = """
        const luminance = getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0];
        return [document.documentElement.scrollWidth, Number(luminance)];
    """
    scroll_width, luminance = browser.execute_script(script)
    assert scroll_width <= width
    assert (luminance < 128) == (scheme == "dark")
    picture = tmp_path / f"{scheme}-{width}.png"
    assert browser.save_screenshot(str(picture))


def test_nodes_are_aligned_in_the_order_of_the_new_graph() -> None:
    lines = [NodeLine(text) for text in ("%a = input", "%b = f(%a)", "%c = g(%b)", "return (%c)")]
    extra = NodeLine("%n = h(%b)", "", "a_pass")
    graph = GraphReport(
        "[root module]",
        "",
        before=tuple(lines),
        after=(lines[0], lines[1], extra, NodeLine("return (%b, %n)")),
        code="",
        rows=0,
        outputs=0,
        bytes=0,
        seconds={},
    )
    text = page(of_graphs(graph))
    assert re.findall(r'"kind":"(\w+)"', text) == [
        "same",
        "same",
        "inserted",
        "changed",
        "removed",
    ]


def test_a_missing_browser_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="chromium is not installed"), open_browser():
        pass
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=REQUIRED), open_browser():
        pass
