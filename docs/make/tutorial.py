"""Executes the notebook of the tutorial in place: ``python -m docs.make.tutorial`` from the root.

It needs what ``pip install -e '.[docs,test]'`` installs, and a Chrome for the pictures.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from docs.make.pages import NOTEBOOK

KERNEL = "tmm-docs"


def executed(path: Path, folder: Path, renderer: str) -> NotebookNode:
    """The notebook with what its cells gave; it runs in ``folder``, by this Python.

    ``renderer`` is how plotly shows its pictures. Raises CellExecutionError if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as home:
        kernel = Path(home) / "kernels" / KERNEL
        kernel.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        text = json.dumps({"argv": command, "display_name": "Python", "language": "python"})
        (kernel / "kernel.json").write_text(text)
        before = {name: os.environ.get(name) for name in ("JUPYTER_PATH", "PLOTLY_RENDERER")}
        os.environ |= {"JUPYTER_PATH": home, "PLOTLY_RENDERER": renderer}
        try:
            place = {"metadata": {"path": str(folder)}}
            NotebookClient(notebook, kernel_name=KERNEL, timeout=300, resources=place).execute()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
    return _plain(notebook)


def _plain(notebook: NotebookNode) -> NotebookNode:
    """Without what is of one execution: times, widgets, ids that were drawn."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                output.data = {"image/png": data["image/png"]}
                output.metadata = {}
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(NOTEBOOK, Path(folder), "png"), NOTEBOOK)
