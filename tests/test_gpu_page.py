"""The table of what is known of GPUs: each of its tests is one."""

from __future__ import annotations

import ast
import re

from tests.test_floors import ROOT

PAGE = ROOT / "docs" / "reference" / "gpu.md"


def rows() -> dict[int, tuple[str, str, str]]:
    """What was, the tests, and what is now, of each hazard."""
    found = {}
    for line in PAGE.read_text().splitlines():
        number, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if number.isdigit():
            was, tests, now = cells
            found[int(number)] = (was, tests, now)
    return found


def test_all_twenty_hazards_are_listed_with_what_became_of_them() -> None:
    found = rows()
    assert list(found) == list(range(1, 21))
    for _, tests, now in found.values():
        assert now.startswith(("mended", "documented", "cannot be reproduced"))
        assert tests or not now.startswith("mended")


def test_the_tests_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"
