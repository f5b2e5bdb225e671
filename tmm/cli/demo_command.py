"""``tmm demo``: train a small GPT and show what was measured."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tmm.cli.output import AsJson, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from tmm.cli.demo_training import TrainingSettings
    from tmm.cli.training_progress import TrainingProgress


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 200,
    run: Annotated[
        Path,
        typer.Option(
            help="Folder to record into. The training starts anew each time, so a folder that"
            " exists is never continued: a number is added to the name, as in runs/demo-2."
        ),
    ] = Path("runs/demo"),
    every: Annotated[int, typer.Option(min=1, help="Monitor each step divisible by this.")] = 10,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Backend of torch.compile: inductor, or aot_eager where there is no C++ compiler."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, batches and dropout.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train, such as cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Train a small GPT on Python's own documentation, compiled and monitored.

    Takes about a minute on two CPU cores, compilation included.
    Prints what the last monitored step measured and leaves a run folder.
    """
    import torch
    from rich.console import Console

    from tmm.cli.demo_training import TrainingSettings, train
    from tmm.cli.training_progress import TrainingProgress
    from tmm.core.dynamo_private import BackendCompilerFailed

    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise typer.BadParameter(
            f"torch.compile knows no {backend!r}; try inductor, aot_eager or eager",
            param_hint="--backend",
        )
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"{device!r}: {reason}", param_hint="--device") from None
    console = Console(stderr=as_json)
    if backend is None:
        backend = "inductor" if device != "cpu" or _has_compiler() else "aot_eager"
        if backend != "inductor":
            console.print(
                "There is no C++ compiler (g++ or clang), which Inductor needs: the training runs"
                " with the backend aot_eager, which is slower.",
                highlight=False,
            )
    settings = TrainingSettings(_unused(run), steps, every, backend, seed, device)
    try:
        with TrainingProgress(console, settings) as progress:
            validation_loss = train(settings, progress.report)
    except BackendCompilerFailed as error:
        problem = _compiler_problem(error)
        if problem is None:
            raise
        typer.secho(problem, err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    _show(console, settings, progress, validation_loss)
    if as_json:
        print_json(_last_step(settings, progress, validation_loss))


def _last_step(
    settings: TrainingSettings, progress: TrainingProgress, validation_loss: float
) -> dict[str, object]:
    from tmm.runs.recorded_run import open_run

    with open_run(settings.run) as run:
        last = int(run.steps[-1])
        values = {key: value for key, value in run.at(last).items() if isinstance(value, float)}
    losses = {"first": progress.first_loss, "last": progress.last_loss}
    losses["validation"] = validation_loss
    return {"run": settings.run, "step": last, "loss": losses, "values": values}


def _show(
    console: Console,
    settings: TrainingSettings,
    progress: TrainingProgress,
    validation_loss: float,
) -> None:
    from tmm.cli.training_progress import layer_table
    from tmm.core.families import ACTIVATION
    from tmm.core.keys import key_of
    from tmm.runs.recorded_run import open_run

    with open_run(settings.run) as run:
        last = int(run.steps[-1])
        table, numbers = layer_table(run, last), len(run.at(last))
        example = run.keys(key_of(ACTIVATION.name, r"h\.\d+\.mlp", "rms"))[-1]
    console.print()
    console.print(table)
    console.print(
        f"Loss {progress.first_loss:.2f} -> {progress.last_loss:.2f},"
        f" on held-back text {validation_loss:.2f}."
    )
    console.print(progress.cost(numbers), markup=False, highlight=False)
    lines = [
        f"The run lies in {settings.run}. Open it in Python:",
        "",
        "    import tmm",
        f"    run = tmm.open_run({str(settings.run)!r})",
        f"    steps, values = run.series({example!r})",
        f"    run.at({last})  # everything that was measured at that step",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _unused(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(c for c in candidates if not c.exists())


def _has_compiler() -> bool:
    from tmm.core.inductor_private import find_compiler, is_missing_compiler

    try:
        find_compiler()
    except Exception as error:
        if not is_missing_compiler(error):
            raise
        return False
    return True


def _compiler_problem(error: Exception) -> str | None:
    from tmm.core.inductor_private import is_failed_compiler, is_missing_compiler

    cause = getattr(error, "inner_exception", None)
    if is_missing_compiler(cause):
        found = "found none"
    elif is_failed_compiler(cause):
        found = f"could not use this one:\n\n{cause}\n"
    else:
        return None
    return (
        f"The backend inductor needs a C++ compiler (g++ or clang) and {found}.\n"
        "Install one, or run without:\n\n    tmm demo --backend aot_eager"
    )
