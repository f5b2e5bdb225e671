"""Facts that have one home: nobody else writes them down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.test_floors import FILES
from tmm.core.families import FAMILIES

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
