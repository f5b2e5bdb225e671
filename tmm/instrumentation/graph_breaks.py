"""Why parts of a model run outside of graphs, as far as Dynamo says."""

from __future__ import annotations

import re
from collections import Counter

import torch

from tmm.core.dynamo_private import InstructionTranslator, counters

PROGRAM = "_traced"
"""What the names of functions that programs are compiled from begin with."""

_KINDS = ("graph_break", "unimplemented")


class GraphBreaks:
    """The reasons for which Dynamo left graphs, by the module whose frame it was tracing."""

    def __init__(self) -> None:
        self.reasons: dict[torch.nn.Module, dict[str, None]] = {}
        self._seen: Counter[str] = Counter()
        self._total = 0
        self.skip()

    def skip(self) -> None:
        """Forget what Dynamo has met until now: it belongs to other programs."""
        if _total() != self._total:
            self._seen, self._total = _counts(), _total()

    def note(self, module: torch.nn.Module) -> None:
        """Credit to ``module`` what Dynamo has met since the last call."""
        if _total() == self._total:
            return
        for reason in _counts() - self._seen:
            self.reasons.setdefault(module, {})[_summary(reason)] = None
        self.skip()

    def add(self, module: torch.nn.Module, reason: str) -> None:
        """Credit a reason of ours to ``module``."""
        self.reasons.setdefault(module, {})[reason] = None

    def of(self, *modules: torch.nn.Module | None) -> str:
        """The reasons of the first of ``modules`` that has any."""
        for module in modules:
            if module is not None and (reasons := self.reasons.get(module)):
                return "; ".join(reasons)
        return "no graph holds it"


def end_of_graph(module: torch.fx.GraphModule) -> str:
    """Where and why a graph break ended a graph that Dynamo traced; empty where none did."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    places = [f"{frame.filename}:{frame.lineno}: " for frame in reason.user_stack[-1:]]
    return "".join(places) + _summary(reason.reason)


def is_whole(module: torch.fx.GraphModule) -> bool:
    """Whether a graph that is being traced holds all that a program of ours runs."""
    return _frame().startswith(PROGRAM) and not end_of_graph(module)


def begins_forward() -> bool:
    """Whether the frame that is being traced is a module's forward, from its beginning."""
    return _frame() == "forward"


def _frame() -> str:
    name: str = InstructionTranslator.current_tx().f_code.co_name
    return name


def _total() -> int:
    return sum(sum(counters[kind].values()) for kind in _KINDS)


def _counts() -> Counter[str]:
    counts: Counter[str] = Counter()
    for kind in _KINDS:
        counts.update(counters[kind])
    return counts


def _summary(reason: object) -> str:
    """Title and explanation of one of Dynamo's messages, on one line."""
    title, _, rest = str(reason).partition("\n")
    explanation = rest.strip().partition("\n")[0].removeprefix("Explanation: ")
    text = f"{title}: {explanation}" if explanation else title
    return re.sub(r" at 0x[0-9a-f]+", "", text)
