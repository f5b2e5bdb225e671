"""The graphs that the passes made, written to a folder for debugging."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.fx import GraphModule

from tmm.passes.graph.printer import node_lines
from tmm.passes.pipeline import Watch


class TraceFolder:
    """Writes each graph as it was traced and after each pass, and the time that each pass took.

    Graph 0 goes to ``graph-000/0-traced.txt``, ``graph-000/1-insert_reductions.txt`` and so on,
    the seconds to ``graph-000/seconds.txt``. What an earlier process left in the folder is kept.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._offset = len(list(path.glob("graph-*")))

    def begin(self, index: int, module: GraphModule, names: Mapping[int, str]) -> Watch:
        """Write a graph as it was traced; the result is to be called after each pass."""
        folder = self.path / f"graph-{self._offset + index:03}"
        folder.mkdir(exist_ok=True)
        passes: list[str] = []

        def write(name: str, graph: GraphModule, seconds: float) -> None:
            text = "\n".join(map(str, node_lines(graph, names, taps=True)))
            (folder / f"{len(passes)}-{name}.txt").write_text(text + "\n", "utf-8")
            passes.append(f"{name} {seconds:.6f}" if passes else "")
            (folder / "seconds.txt").write_text("\n".join(passes[1:]) + "\n", "utf-8")

        write("traced", module, 0.0)
        return write
