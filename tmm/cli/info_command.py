"""``tmm info`` and ``tmm explain``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from tmm.cli.output import AsJson, Query, Root, fail, print_json, print_table, told
from tmm.cli.terminal import clean_lines

_OPTIONAL = ("psutil", "nvidia-ml-py", "plotly", "kaleido", "pyarrow", "safetensors")


def info(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Show versions, devices, optional packages and how many runs there are."""
    import torch

    from tmm.runs.catalog import list_runs
    from tmm.runs.remote import address_of

    found: dict[str, object] = {
        "tmm": version("tmm-compile"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "kernels": _kernels(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "optional": {name: _version(name) for name in _OPTIONAL},
        "root": str(root),
        "runs": len(list_runs(root)) if root.is_dir() or address_of(root) else 0,
    }
    if as_json:
        print_json(found)
        return
    optional, kernels = found.pop("optional"), found.pop("kernels")
    assert isinstance(optional, dict)
    assert isinstance(kernels, dict)
    rows = [
        *found.items(),
        *((f"kernels, {device}", _in_words(used)) for device, used in kernels.items()),
        *((name, value or "not installed") for name, value in optional.items()),
    ]
    print_table("tmm", ("", ""), rows)


def explain(query: Query, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Show what was measured in a run and where, what was not and why, and its graphs."""
    from tmm.runs.catalog import find_run
    from tmm.runs.recorded_run import open_run

    with told():
        record = find_run(query, root)
        with open_run(record.path) as run:
            try:
                text = run.text("explain.txt")
            except FileNotFoundError:
                fail(f"the run {record.id} watched no model")
    if as_json:
        print_json({"id": record.id, "text": text})
    else:
        typer.echo(clean_lines(text))


def _kernels() -> dict[str, dict[str, str]]:
    """What each operation is made of that runs on each type of device of this machine."""
    import torch

    from tmm.kernels.kernel_registry import OPERATIONS, describe

    accelerator = torch.accelerator.current_accelerator()
    devices = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    return {
        device: {operation: describe(operation, device) for operation in OPERATIONS}
        for device in devices
    }


def _in_words(used: Mapping[str, str]) -> str:
    """One text if all operations are alike."""
    if len(set(used.values())) == 1:
        return next(iter(used.values()))
    return "; ".join(f"{operation}: {text}" for operation, text in used.items())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
