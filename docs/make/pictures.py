"""Draws the pictures of the pages from real runs: ``python -m docs.make.pictures`` from the root.

It trains the tutorial's model and the GPT of the demo, and takes pictures of what tmm writes, in a
Chromium. Takes some minutes. The pictures of the coordinate check come from
``tmm coord-check -o docs/pictures``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

import tmm
from docs.make.pages import DOCS, NOTEBOOK
from docs.make.tutorial import executed
from tests.browser import open_browser
from tmm.examples.gpt import GPT, GPTConfig
from tmm.views.report import write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PICTURES = DOCS / "pictures"
_COLOURS = 255  # of a picture: enough for pages, at a fourth of the size


def draw(folder: Path) -> None:
    """Draw all of them; ``folder`` is for the runs."""
    executed(NOTEBOOK, folder, "json")
    demo = ["demo", "--steps", "150", "--every", "5", "--run", str(folder / "runs" / "demo")]
    subprocess.run(
        [sys.executable, "-c", "from tmm.cli import app; app()", *demo], check=True, cwd=folder
    )
    records = {record.name: record for record in tmm.list_runs(folder / "runs")}
    report, layers = folder / "report.html", folder / "layers.html"
    write_report([records["first"]], str(report))
    write_report([records["demo"]], str(layers))
    explanation = explain_page(folder / "explain.html")
    with open_page(report, 1180, 1000) as browser:
        take(browser, "report.png", height=980)
    with open_page(layers, 1180, 1000) as browser:
        scroll_to(browser, "Layers over steps")
        take(browser, "layers.png", height=900)
    with open_page(explanation, 1180, 1000) as browser:
        take(browser, "explain.png", height=900)


def explain_page(path: Path) -> Path:
    """What ``tmm.explain`` says of a small GPT after a monitored step, as a page."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(layers=2, heads=2, width=64, context=32))
    spec = tmm.Spec(tmm.activation("rms", "absmax"), tmm.attention("entropy", modules=r".*attn$"))
    model = tmm.instrument(torch.compile(net, backend="aot_eager"), spec)
    with tmm.monitor(model).step(0):
        model(torch.randint(256, (2, 32))).square().mean().backward()
    return tmm.explain(model).to_html(path)


@contextmanager
def open_page(path: Path, width: int, height: int) -> Iterator[Chrome]:
    """A page in a browser, in light colours, when its pictures are drawn."""
    with open_browser() as browser:
        browser.set_window_size(width, height)
        light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
        browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
        browser.get(path.as_uri())
        time.sleep(4)
        yield browser


def scroll_to(browser: Chrome, heading: str) -> None:
    """Bring a heading to the top, and wait until what is below it is drawn."""
    script = (
        "const found = [...document.querySelectorAll('h2, h3, summary')]"
        ".find(one => one.textContent.toLowerCase().includes(arguments[0].toLowerCase()));"
        "found.scrollIntoView(); return found.textContent"
    )
    browser.execute_script(script, heading)
    time.sleep(4)


def take(browser: Chrome, name: str, height: int) -> None:
    """Save what is to be seen, without the rest of the window, in few colours."""
    path = PICTURES / name
    browser.save_screenshot(str(path))
    with Image.open(path) as picture:
        cut = picture.convert("RGB").crop((0, 0, picture.width, min(height, picture.height)))
        cut.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        draw(Path(made))
