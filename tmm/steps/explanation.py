"""What monitoring covers of a model, and what the passes did to its graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tmm.core.families import VALUE_FAMILY
from tmm.core.keys import key_of
from tmm.core.module_names import display_name
from tmm.instrumentation.compile_settings import settings_of
from tmm.instrumentation.graph_report import GraphReport
from tmm.instrumentation.twin import Twin
from tmm.passes.graph.printer import site_label
from tmm.spec.program_choice import ProgramChoice
from tmm.spec.rules import Rule
from tmm.steps.own_functions import own_functions
from tmm.steps.silent import HadGradient, silent_modules, used

NOT_COMPILED = "it is not compiled"
"""Why a module is measured where it is called, and by no graph."""

_SHOWN = 12  # names of modules in a line of text
_BY_RANK = (
    "measured by each rank under a name of its own (tmm.instrument(..., placements={regular"
    ' expression: "shard" or "replicate"}) says how ranks hold an output):'
)


@dataclass(frozen=True)
class RuleReport:
    """A rule: which modules or parameters (the ``subject``) it measures, and which others exist.

    Those that are matched and have no rows are ``silent``, once the model has run.
    """

    rule: str
    subject: str
    matched: tuple[str, ...]
    others: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    family: str = ""


@dataclass(frozen=True)
class ModuleReport:
    """A module of the model: its type, the metrics asked for and how its rows come about.

    ``measured`` is ``"graph"``, ``"eager"``, both joined by ``" and "``, or empty for a module
    that has no rows (yet).
    """

    name: str
    type: str
    metrics: tuple[str, ...]
    measured: str


@dataclass(frozen=True)
class Explanation:
    """What ``tmm.explain`` found; ``str`` of it is a report and ``to_html`` writes a page.

    Attributes:
        modules: every module of the model, in the order of ``named_modules``.
        rules: what each rule of the spec measures, and what not.
        regions: the parts that are compiled, by name, with their settings.
        graphs: the rewritten graphs; each has its nodes ``before`` and ``after``, a ``diff`` and
            ``code`` that runs as Python.
        sites: the tensors that are measured, by the start of their keys, with their metrics.
        rows: how many rows a step records; several metrics of a tensor share one.
        recorded: the names that the model gave to ``tmm.record``.
        eager: the modules that ran outside of graphs, with the reason.
        unmeasured: what has no rows, with the reason.
        by_rank: of a tensor parallel model, what each rank measures under a name of its own, with
            the reason why rows are not joined.
        notes: what rows are of, where their names do not tell it: those of a family, or of a site;
            and how the user's own metrics are computed.
        untold: what could not be told of the model, with the reason; rows do not depend on it.
        not_called: the matched modules of which no call was seen that gave a tensor, with the
            reason.
        programs: of a compiled model, whether steps that are not monitored run its own program, and
            why; empty for others.
        without_rows: the matched parameters that had no rows in any step so far, by the family of
            the rule, as in ``"gradient of 0.weight"``, with the reason.
    """

    modules: tuple[ModuleReport, ...]
    rules: tuple[RuleReport, ...]
    regions: dict[str, str]
    graphs: tuple[GraphReport, ...]
    sites: dict[str, tuple[str, ...]]
    rows: int
    recorded: tuple[str, ...]
    eager: dict[str, str]
    unmeasured: dict[str, str]
    by_rank: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    untold: tuple[str, ...] = ()
    not_called: dict[str, str] = field(default_factory=dict)
    without_rows: dict[str, str] = field(default_factory=dict)
    programs: str = ""

    @staticmethod
    def of(
        twin: Twin,
        programs: ProgramChoice,
        without_rows: dict[str, str],
        had_gradient: HadGradient,
    ) -> Explanation:
        """The state of ``twin`` now, and of parameters ``without_rows``, with the reasons."""
        attribution = twin.attribution
        traced = _traced_modules(twin)
        silent = silent_modules(twin, had_gradient) if attribution.rows else {}
        eager = {
            attribution.name(module): twin.breaks.of(module, caller)
            if module in traced
            else NOT_COMPILED
            for module, caller in twin.eager_modules.items()
        }
        unmeasured = attribution.unmeasured | twin.recorder.registry.owners.refused
        unmeasured |= _compiled_methods(twin) | _eager_attention(twin)
        idle = silent
        if twin.untraced is not None:
            eager = {attribution.name(module): NOT_COMPILED for module in twin.untraced.ran}
            unmeasured |= twin.untraced.uncalled.bypassed()
            idle = twin.untraced.uncalled.idle()
        unmeasured = used(silent) | unmeasured
        not_called = {name: why for name, why in idle.items() if name not in used(silent)}
        return Explanation(
            modules=tuple(
                ModuleReport(
                    display_name(name),
                    type(module).__name__,
                    twin.plan.metrics(display_name(name)),
                    attribution.how_measured(module),
                )
                for module, name in attribution.names.items()
            ),
            rules=tuple(
                RuleReport(
                    str(rule),
                    rule.subject,
                    names,
                    tuple(n for n in twin.plan.candidates(rule) if n not in set(names)),
                    _silent(rule, names, silent, without_rows),
                    rule.family,
                )
                for rule, names in twin.plan.matched.items()
            ),
            regions=_regions(twin),
            graphs=tuple(graph.report for graph in twin.graphs),
            sites=_sites(twin),
            rows=len(attribution.rows),
            recorded=tuple(twin.eager_rows.values.reductions),
            eager=eager,
            unmeasured=unmeasured,
            by_rank=dict(attribution.by_rank),
            notes=attribution.notes | own_functions(twin),
            untold=tuple(twin.notes.texts),
            not_called=not_called,
            without_rows=without_rows,
            programs="" if twin.untraced is not None else str(programs),
        )

    def __str__(self) -> str:
        lines = [*self._rules(), *self._programs(), *self._graphs()]
        if self.sites:
            lines.append("sites, in the order of execution:")
            lines += [f"    {site}: {', '.join(metrics)}" for site, metrics in self.sites.items()]
        if self.recorded:
            lines += ["recorded by the model itself:", *(f"    {name}" for name in self.recorded)]
        if self.regions:
            lines += _listed("measured eagerly, outside of graphs:", self.eager)
        elif self.eager:
            called = (f"    {name}" for name in self.eager)
            lines += ["measured where the model calls them:", *called]
        lines += _listed("not called so far:", self.not_called)
        lines += _listed(_BY_RANK, self.by_rank)
        lines += _listed("to be known of rows:", _together(self.notes))
        lines += _listed("not measured:", self.unmeasured)
        if self.untold:
            lines += ["not told here:", *(f"    {note}" for note in self.untold)]
        lines += [f"\n{graph.diff}" for graph in self.graphs if graph.diff]
        return "\n".join(lines)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one page that needs nothing else: module tree, nodes, graphs side by side.

        Raises:
            OSError: if ``path`` cannot be written.
        """
        from tmm.views.explain_page import page

        target = Path(path)
        target.write_text(page(self), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        from tmm.views.report.card import explanation_card

        return explanation_card(self)

    def _rules(self) -> list[str]:
        lines = []
        for rule in self.rules:
            count = len(rule.matched) + len(rule.others)
            measured = len(rule.matched) - len(rule.silent)
            lines.append(f"{rule.rule}: {measured} of {count} {rule.subject}")
            if rule.subject == "parameters":
                lines += [f"    {name}" for name in rule.matched if name not in rule.silent]
                lines += self._without_rows(rule)
            else:
                lines += [f"    {name}" for name in rule.matched]
            if rule.silent and rule.subject == "modules":
                lines.append(f"    matched, no call seen: {_some(rule.silent)}")
            if rule.others:
                lines.append(f"    not matched: {_some(rule.others)}")
        return lines

    def _without_rows(self, rule: RuleReport) -> list[str]:
        reasons = {name: self.without_rows[f"{rule.family} of {name}"] for name in rule.silent}
        return [f"    without rows: {some}: {why}" for some, why in _together(reasons).items()]

    def _programs(self) -> list[str]:
        own = "not compiled: the model's own program runs on every step, and is measured there"
        lines = ["compiled:"] if self.regions else [own]
        groups: dict[str, list[str]] = {}
        for name, settings in self.regions.items():
            groups.setdefault(settings, []).append(name)
        lines += [f"    {', '.join(names)}: {how}" for how, names in groups.items()]
        return [*lines, f"    {self.programs}"] if self.programs else lines

    def _graphs(self) -> list[str]:
        if self.eager and not self.graphs:
            further = ["no graph: everything ran eagerly"] if self.regions else []
            return [f"rows in a step: {self.rows}", *further]
        if not self.regions and not any(rule.subject == "modules" for rule in self.rules):
            return []  # nothing is asked of them
        if not self.regions:
            return ["no rows yet: the model has not run in a monitored step"]
        if not self.graphs:
            return [
                "no graph yet: the model has not run in a monitored step; graphs, what they hold"
                " and what stays outside are known after the first one (or monitor.prepare(*batch))"
            ]
        lines = [f"rows in a step: {self.rows}"]
        for graph in self.graphs:
            passes = ", ".join(f"{name} {s * 1e3:.1f} ms" for name, s in graph.seconds.items())
            lines.append(
                f"graph {graph.index}, of {graph.owner}: {graph.rows} rows, extra outputs:"
                f" {graph.outputs} ({graph.bytes} bytes); {passes}"
            )
            if graph.ended_by:
                lines.append(f"    ended by a graph break at {graph.ended_by}")
            lines += _lowerings(graph)
        return lines


def _lowerings(graph: GraphReport) -> list[str]:
    """Which sites of a graph ride in kernels that are there, and which have an operator, why."""
    by_reason: dict[str, dict[str, None]] = {}
    for family, site, why in graph.lowerings:
        by_reason.setdefault(why, {})[site_label(family, site)] = None
    lines = []
    if fused := by_reason.pop("", None):
        lines.append(f"    fused into other kernels: {_some(list(fused))}")
    further = ((why, _some(list(names))) for why, names in by_reason.items())
    return [*lines, *(f"    by an operator, {why}: {names}" for why, names in further)]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _silent(
    rule: Rule, names: tuple[str, ...], modules: dict[str, str], parameters: dict[str, str]
) -> tuple[str, ...]:
    if rule.subject == "modules":
        return tuple(name for name in names if name in modules)
    return tuple(name for name in names if f"{rule.family} of {name}" in parameters)


def _listed(title: str, items: dict[str, str]) -> list[str]:
    return [title, *(f"    {name}: {text}" for name, text in items.items())] if items else []


def _together(notes: dict[str, str]) -> dict[str, str]:
    """The names of each text: most parameters tend to have the same."""
    names: dict[str, list[str]] = {}
    for name, text in notes.items():
        names.setdefault(text, []).append(name)
    return {_some(some): text for text, some in names.items()}


def _traced_modules(twin: Twin) -> set[torch.nn.Module]:
    """The modules that Dynamo traces where nothing keeps it from doing so."""
    compiled = [region for region in (twin.root, *twin.regions) if region.settings is not None]
    roots = [twin.module if region.module is None else region.module for region in compiled]
    return {module for root in roots for module in root.modules()}


def _sites(twin: Twin) -> dict[str, tuple[str, ...]]:
    sites: dict[str, tuple[str, ...]] = {}
    for measurement in twin.attribution.rows:
        if measurement.family != VALUE_FAMILY:
            place = measurement.site
            site = key_of(measurement.family, place.named(place.module + place.path))
            sites[site] = (*sites.get(site, ()), *measurement.reduction.metrics)
    return sites


def _compiled_methods(twin: Twin) -> dict[str, str]:
    """Methods that are compiled by themselves, of modules whose forward runs outside of graphs."""
    measured = {(region.module, "forward") for region in (twin.root, *twin.regions)}
    return {
        f"{twin.attribution.name(module)}.{name}": "compiled by itself: what it calls has no rows"
        for module in twin.eager_modules
        for kind in type(module).__mro__
        for name, value in vars(kind).items()
        if settings_of(value) is not None and (module, name) not in measured
    }


def _eager_attention(twin: Twin) -> dict[str, str]:
    """Modules that ran outside of graphs, where attention is not looked for."""
    names = (twin.attribution.name(module) for module in twin.eager_modules)
    asked = [name for name in names if twin.plan.attention(name)]
    if not asked:
        return {}
    why = f"it is looked for in graphs only; outside ran {_some(asked)}"
    return {"attention outside of graphs": why}


def _regions(twin: Twin) -> dict[str, str]:
    regions: dict[str, str] = {}
    for region in (twin.root, *twin.regions):
        if region.settings is not None:
            name = "the step function"
            if region.module is not None:
                name = twin.attribution.name(region.module)
            regions.setdefault(name, str(region.settings))
    return regions
