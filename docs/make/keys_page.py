"""The page of every family of keys and every metric, from the tables that make them."""

from __future__ import annotations

from docs.make.pieces import table
from tmm.core.families import FAMILIES, Family
from tmm.core.metrics import ATTENTION_METRICS, DERIVED_METRICS, METRICS, STATE_METRICS

METRIC_TEXTS = {
    "mean": "Σx / n",
    "std": "as `torch.std`, with correction 1; NaN for one element",
    "rms": "√(Σx² / n)",
    "norm": "√Σx²",
    "mean_abs": "Σ\\|x\\| / n",
    "absmax": "the largest \\|x\\|",
    "min": "the smallest x",
    "max": "the largest x",
    "zero_fraction": "the share of exact zeros",
    "nan_count": "how many elements are NaN",
    "inf_count": "how many elements are +inf or -inf",
    "kurtosis": "m₄ / m₂² of central moments; NaN for a constant",
    "histogram": "counts per bin, an array of 115; the edges are `tmm.HISTOGRAM_EDGES`",
    "alignment": "⟨after − before, before⟩ / (‖after − before‖ ‖before‖), of updates",
    "relative_norm": "‖a − r‖ / ‖r‖; for an update ‖after − before‖ / ‖before‖",
    "cosine": "⟨a, r⟩ / (‖a‖ ‖r‖)",
    "l2": "the mean of ‖a − r‖ over the rows (the last dimension)",
    "l2norm": "the mean of the 2-norm over the rows (the last dimension)",
    "exp_avg_norm": "the norm of Adam's `exp_avg`",
    "exp_avg_sq_norm": "the norm of Adam's `exp_avg_sq`",
    "effective_lr": "the mean of what Adam multiplies `exp_avg` with",
    "entropy": "mean of −Σ p ln p, in nats",
    "normalized_entropy": "mean of the entropy over ln(number of visible keys); 0 for one key",
    "max_logit": "the largest logit of all",
    "logsumexp": "mean of ln Σ exp(logit)",
    "max_probability": "mean of the largest p",
    "sink_mass": "mean of the p of key 0",
}
"""What each metric is; one that is missing fails the build."""

FAMILY_TEXTS = {
    "model_input": "a tensor among the arguments of the model, with `diagnosis=True`",
    "model_output": "the model's first output with rows, with `diagnosis=True`",
    "activation": "what a module returns",
    "activation_difference": "that, minus what the reference returns on the same batch",
    "activation_gradient": "the gradient of the loss with respect to what a module returns",
    "attention": "the distribution over keys of an attention head, and its tensors",
    "rcc": "the terms of the refined coordinate check",
    "gradient": "the gradient that the optimizer gets",
    "gradient_before_clip": "the gradient before you clip it",
    "update": "a parameter after the optimizer's step, minus before",
    "optimizer_state": "what the optimizer keeps of a parameter",
    "parameter": "a parameter at the end of the step",
    "parameter_difference": "a parameter, minus that of the reference",
    "step": "something of the whole step",
    "system": "something of the machine or the process",
}
"""What each family is of; one that is missing fails the build."""

FORMS = {
    "model_input": "`model_input/{argument}/{metric}`",
    "model_output": "`model_output/output/spread`",
    "attention": "`attention_{metric}/{module}.head_{i}`, `activation/{module}.head_{i}.query/{metric}`",
    "rcc": "`RCC {term}/{module}/l2norm`",
    "step": "`step/{name}`",
    "system": "`system/{name}`",
}

WHOLE = (
    ("step/gradient_norm", "the norm of all gradients together"),
    ("step/gradient_norm/{block}", "that of one block of the model"),
    ("step/gradient_norm_before_clip", "that of all gradients, before you clip them"),
    ("step/frozen/{parameter}", "1 where a parameter is frozen, with `diagnosis=True`"),
    ("step/without_optimizer/{parameter}", "1 where no optimizer holds a parameter"),
    ("step/without_gradient/{parameter}", "1 where a parameter gets no gradient"),
    ("step/optimizer_age", "how many steps the state of the optimizer has seen"),
    (
        "step/replicas_differing",
        "how many parameters ranks do not hold alike, with `replicas_agree=n`",
    ),
    ("step/replicas_differing/{parameter}", "1 where that is the first of them"),
    ("step/started", "1 at the first monitored step of a run that was resumed"),
    ("step/skipped", "1 where a `GradScaler` skipped the optimizer's step"),
    ("step/grad_scale", "the scale of the `GradScaler`"),
    ("system/cpu_percent", "load of all processors, percent"),
    ("system/process_cpu_percent", "load of this process, percent of one processor"),
    ("system/process_memory", "memory of this process, bytes"),
    ("system/host_memory", "memory in use on the machine, bytes"),
    ("system/host_memory_percent", "the same, percent"),
    ("system/gpu_{i}/memory", "memory in use on a GPU, bytes"),
    ("system/gpu_{i}/memory_percent", "the same, percent"),
    ("system/gpu_{i}/utilisation_percent", "load of a GPU, percent"),
    ("system/gpu_{i}/temperature", "degrees Celsius"),
    ("system/gpu_{i}/power", "watts"),
    ("system/gpu_{i}/torch_memory", "what torch has allocated on it, bytes"),
    ("system/step_seconds", "time of the step"),
    ("system/samples_per_second", "rate, with `run.step(samples=...)`"),
    ("system/tokens_per_second", "rate, with `run.step(tokens=...)`"),
)
"""Keys that are of no module and no parameter."""

_INTRODUCTION = """\
# Every key and metric

A key is `family/site/metric`: `activation/blocks.3.mlp/rms` is the root mean square of what the module
`blocks.3.mlp` returns. This page lists all of them, and is made from the tables that the code uses.
[What is measured, exactly](metrics.md) defines them to the last case.

## Families
"""


def page() -> str:
    """The whole page."""
    lines = [_INTRODUCTION]
    lines += table(
        ("rule", "of", "keys"),
        (
            (f"`tmm.{name}`" if _has_rule(family) else "", FAMILY_TEXTS[name], _form(family))
            for name, family in FAMILIES.items()
        ),
    )
    lines += [
        "The keys of `gradient_before_clip` come from `monitor.monitor_gradients(before_clip=True)`,",
        "those of `step` and `system` by themselves. A value of `tmm.record(name, x)` has the key",
        "`name`, and a value of `run.log({name: x})` the same.",
        "",
        "## Metrics",
        "",
        "Of the elements *x* of a site, over all calls and micro-batches of a step.",
        "",
    ]
    names = [*METRICS, "histogram"]
    lines += table(("metric", "value"), ((f"`{name}`", METRIC_TEXTS[name]) for name in names))
    lines += ["## Metrics of single families", ""]
    lines += table(
        ("metric", "value", "of"),
        ((f"`{name}`", METRIC_TEXTS[name], _families_of(name)) for name in DERIVED_METRICS),
    )
    lines += ["## Metrics of attention", "", "Over the queries of all items of a step.", ""]
    lines += table(
        ("metric", "value"), ((f"`{name}`", METRIC_TEXTS[name]) for name in ATTENTION_METRICS)
    )
    lines += [
        "`tmm.attention` takes these metrics and, for the tensors of a head, those of modules"
        " without `histogram`.",
        "",
        "## Keys of no module and no parameter",
        "",
    ]
    lines += table(("key", "value"), ((f"`{key}`", text) for key, text in WHOLE))
    return "\n".join(lines).rstrip() + "\n"


def _has_rule(family: Family) -> bool:
    return family.subject is not None and family.name != "gradient_before_clip"


def _form(family: Family) -> str:
    if family.name in FORMS:
        return FORMS[family.name]
    site = "parameter" if family.subject == "parameters" else "module"
    return f"`{family.name}/{{{site}}}/{{metric}}`"


def _families_of(metric: str) -> str:
    if metric in STATE_METRICS:
        return "`optimizer_state`"
    found = [f"`{name}`" for name, family in FAMILIES.items() if metric in family.metrics]
    return ", ".join(found)
