"""What monitoring covers of a model."""

from __future__ import annotations

from dataclasses import dataclass

from tmm.naming import display_name
from tmm.twin import Twin


@dataclass(frozen=True)
class Explanation:
    """What ``tmm.explain`` found; ``str`` of it is a report.

    ``matched`` lists the modules of each rule; ``graphs`` the rows and extra outputs of each
    rewritten graph; ``eager`` the modules that were called outside of graphs; ``unmeasured`` what
    has no rows, and why.
    """

    matched: dict[str, tuple[str, ...]]
    graphs: tuple[tuple[int, int], ...]
    eager: tuple[str, ...]
    unmeasured: dict[str, str]

    @staticmethod
    def of(twin: Twin) -> Explanation:
        """The state of ``twin`` now."""
        matched = {str(rule): names for rule, names in twin.plan.matched.items()}
        graphs = tuple((len(g.layout.rows), g.layout.outputs) for g in twin.backend.graphs)
        eager = tuple(display_name(n) for m, n in twin.names.items() if m in twin.eager_modules)
        return Explanation(matched, graphs, eager, dict(twin.unmeasured))

    def __str__(self) -> str:
        lines = []
        for rule, names in self.matched.items():
            lines.append(f"{rule}: {len(names)} modules")
            lines += [f"    {name}" for name in names]
        if not self.graphs:
            lines.append("no graph yet: the model has not run in a monitored step")
        for index, (rows, outputs) in enumerate(self.graphs):
            lines.append(f"graph {index}: {rows} rows in {outputs} extra outputs")
        if self.eager:
            lines.append("measured eagerly, because a graph break leaves them outside of graphs:")
            lines += [f"    {name}" for name in self.eager]
        if self.unmeasured:
            lines.append("not measured:")
            lines += [f"    {site}: {reason}" for site, reason in self.unmeasured.items()]
        return "\n".join(lines)
