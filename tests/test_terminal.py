"""What commands print of texts of others: nothing that a terminal or a spreadsheet obeys."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import tmm
from tests.hostile_runs import read_all
from tmm.cli import app
from tmm.cli.terminal import clean, clean_lines
from tmm.core.records import Event, KeyInfo, StepRecord, Table
from tmm.runs.export import export_run
from tmm.runs.state import State
from tmm.runs.text_values import spreadsheet_text
from tmm.runtime.store.run_writer import RunWriter
from tmm.sinks import CSVSink

HARMS = {
    "sequence": "a\x1b[2J\x1b[31mb",
    "title": "a\x1b]0;other\x07b",
    "one byte": "a\x9b2J\x85\x90b",
    "lines": "a\r\nb\nc\vd\x0ce\u2028f\u2029g",
    "backspace": "abc\b\b\bx\x7f\0",
    "direction": "a\u202etxt.exe\u202c\u2066b\u2069\u200f",
    "no text": "a\ud800b\udfff",
    "unseen": "a\u200bb\ufeff\U000e0041",
    "markup": "[red]a[/red] [link=x]b[/link] :warning: [/nothing]",
    "tabs": "a\tb\xa0c",
}


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("kind", HARMS)
def test_a_text_is_one_line_that_says_nothing_to_a_terminal(kind: str) -> None:
    harm = HARMS[kind]
    shown = clean(harm)
    assert shown.isprintable()
    assert len(shown) == len(harm)
    shown.encode()
    assert [b for b in shown if b.isalnum()] == [b for b in harm if b.isalnum()]
    assert clean_lines(f"{harm}\nx\n").splitlines()[-1] == "x"
    assert is_harmless(clean_lines(harm))


def test_what_people_write_is_shown_as_it_is() -> None:
    for text in ("", "a b", "\u00e4\u6f22\u0639 \U0001f600", "[a](b) {c} a/b=1", "e\u0301"):
        assert clean(text) == text
    assert clean(Path("a")) == "a"
    assert clean("x" * 10, most=4) == "xxxx\u2026"
    assert clean_lines("x" * 10_000) == "x" * 10_000


def write_run(folder: Path, harm: str, value: float) -> Path:
    """A run that says ``harm`` wherever it says something."""
    info = {
        "id": folder.name + harm,
        "project": harm,
        "name": folder.name + harm,
        "config": {harm: harm, "same": [harm], "lr" + harm: value, "deep": {harm: harm}},
        "tags": [harm, folder.name],
        "notes": harm,
    }
    names = ("loss", f"{harm}/loss", f"activation/{harm}/rms")
    keys = tuple(
        KeyInfo(name, name.partition("/")[0], harm, n, "mean", harm) for n, name in enumerate(names)
    )
    with RunWriter(folder, info=info) as writer:
        for step in range(5):
            values = np.array([value, np.nan if step == 3 else 1.0, 2.0])
            events = (Event(step, harm, harm),)
            writer.submit(StepRecord(step, (Table(keys, values),), events=events))
        writer.write_text("explain.txt", f"first\n{harm}\nlast\n")
    State.begin().end("failed", harm, 4).write(folder)
    return folder


@pytest.fixture(params=HARMS)
def harm(request: pytest.FixtureRequest) -> str:
    return HARMS[request.param]


@pytest.fixture
def root(tmp_path: Path, harm: str) -> Path:
    for name, value in (("a", 0.5), ("b", 0.25)):
        write_run(tmp_path / "runs" / name, harm, value)
    return tmp_path / "runs"


def run(root: Path, *arguments: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, [*arguments, "--root", str(root)], input=answer, env=WIDE)


WIDE = {"COLUMNS": "400"}


def test_no_command_prints_what_a_terminal_obeys(root: Path, harm: str, tmp_path: Path) -> None:
    read_all(root / "a")
    commands: tuple[tuple[str, ...], ...] = (
        ("list",),
        ("show", "a"),
        ("compare", "a", "b"),
        ("anomalies", "a"),
        ("plot", "a", "."),
        ("explain", "a"),
        ("watch", "a", "--once"),
        ("runs", "export", "a", str(tmp_path / "a.jsonl")),
        # What is said of what is wrong.
        ("show", "a", "--key", harm + "nothing"),
        ("plot", "a", "nothing"),
        ("show", f"nothing{harm}"),
        ("anomalies", "a", "--type", harm),
        ("compare", "a", f"b{harm}"),
        ("runs", "prune", "--older-than", "0h"),
        ("delete", "a"),
    )
    for command in commands:
        result = run(root, *command, answer="n\n")
        assert isinstance(result.exception, (SystemExit, type(None))), (command, result.exception)
        assert is_harmless(result.output), (command, result.output)
        assert result.output.strip(), command


def test_what_a_run_says_is_shown_as_text(root: Path, harm: str) -> None:
    """Nothing of it is taken for markup, and it takes no more than its own line."""
    listed = run(root, "list").output
    assert listed.count(clean(harm)) >= 4  # names and reasons
    (line,) = (line for line in listed.splitlines() if line.startswith(f"b{clean(harm)}"))
    assert "failed" in line
    shown = run(root, "show", "a").output
    for text in (f"config.{clean(harm)}", f"{clean(harm)}/loss", f"a{clean(harm)}"):
        assert text in shown
    told = run(root, "explain", "a").output
    assert f"\nfirst\n{clean_lines(harm)}\nlast\n" in f"\n{told}"
    assert clean(harm) in run(root, "watch", "a", "--once").output


@pytest.mark.parametrize("name", ["run.json", "state.json", "metrics-001.h5"])
def test_reasons_of_broken_runs_are_clean(root: Path, harm: str, name: str) -> None:
    folder = root / "a"
    (folder / name).write_bytes(f"[{harm}".encode("utf-8", "surrogatepass"))
    if name == "state.json":
        (folder / name).write_text(json.dumps({"status": harm, "started": ""}))
    os.utime(folder / name, (0, 0))  # of a file that is being written, a reader waits for more
    listed, shown = run(root, "list").output, run(root, "show", "a").output
    assert "broken" in listed
    assert is_harmless(listed)
    assert is_harmless(shown)


def test_a_name_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", "x" * 500_000, 1.0)
    for command in (["list"], ["show", "a"], ["watch", "a", "--once"]):
        assert len(run(tmp_path / "runs", *command).output) < 100_000


def test_json_holds_the_texts_themselves(root: Path, harm: str) -> None:
    (first, _) = json.loads(run(root, "list", "--json").stdout)
    assert first["project"] == harm
    assert first["reason"] == harm
    assert json.loads(run(root, "explain", "a", "--json").stdout)["text"].split("\n")[0] == "first"


def test_a_page_holds_the_texts_as_data(tmp_path: Path) -> None:
    harm = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'
    write_run(tmp_path / "runs" / "a", harm, 0.5)
    pytest.importorskip("plotly", reason="a page needs plotly")
    result = run(tmp_path / "runs", "report", "a", "-o", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "alert(1)" not in page.replace("&lt;", "").partition("<body")[2].partition("<script")[0]
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    with tmm.open_run(tmp_path / "runs" / "a") as opened:
        assert "<script" not in opened._repr_html_()
        assert "<img" not in opened._repr_html_()


# Spreadsheets

FORMULAS = ("=1+1", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "'=1", "'", "=")
PLAIN = ("loss", "a/b", "1+1", "a=b", "", " =1", "\u00e4")


def test_what_a_spreadsheet_would_run_is_text() -> None:
    for text in FORMULAS:
        assert spreadsheet_text(text) == f"'{text}"
    for text in PLAIN:
        assert spreadsheet_text(text) == text
    given = (*FORMULAS, *PLAIN)
    assert len(set(map(spreadsheet_text, given))) == len(given)


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file, strict=True))[1:]


@pytest.mark.parametrize("way", ["export", "sink"])
def test_keys_in_csv_files_are_no_formulas_and_numbers_stay_numbers(
    tmp_path: Path, way: str
) -> None:
    keys, values = [*FORMULAS, *PLAIN], (-1.5, 2.0, float("-inf"))
    path = tmp_path / "out.csv"
    sinks: Any = [CSVSink(path)] if way == "sink" else []
    with tmm.start_run("p", root=tmp_path, system_seconds=None, sinks=sinks) as recorded:
        for value in values:
            recorded.log({key: value for key in keys if key})
            recorded.step()
    if way == "export":
        with tmm.open_run(recorded.path) as opened:
            export_run(opened, path)
    found = [row for row in rows_of(path) if not row[1].startswith("system/")]
    assert len(found) == len(values) * (len(keys) - 1)
    for step, key, value in found:
        assert not key.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
        assert key.removeprefix("'") in keys
        assert float(value) == values[int(step)]
