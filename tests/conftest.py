import gc
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

if "PYTEST_XDIST_WORKER" in os.environ:
    # Other workers have the other cores. Torch reads it once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["TMM_INDEX"] = ""  # what tests list leaves nothing in the home of who runs them

import pytest
import torch

from tests import longest_files, truth_table
from tests.interpreters import Interpreters, collect_garbage_seldom, leave_guards_untimed


def pytest_xdist_auto_num_workers() -> int | None:
    """Half as many again as cores: tests wait for processes, and for each other at the end.

    Each takes up to 1.3 GB, and what it starts some more.
    """
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores + cores // 2, memory // (2 << 30)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first, so that no worker is left with one at the end."""
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (longest_files.place(item.path), -count[item.path], item.path))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage is to look at it again."""
    gc.collect()
    gc.freeze()


leave_guards_untimed()
collect_garbage_seldom()

# Pytest gives a handler to each logger that does not propagate. With one, torch writes a trace of
# each compilation, which takes long and which nobody reads.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test sees what another one compiled, nor its random numbers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.default_generator.manual_seed(0)  # for devices that are not there, it would keep stacks
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
        yield


@pytest.fixture(scope="session")
def interpreters() -> Iterator[Interpreters]:
    """Processes that have imported tmm; the first one takes seconds, each other one little."""
    with closing(Interpreters()) as server:
        yield server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = (report for reports in terminalreporter.stats.values() for report in reports)
    lines = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == truth_table.PROPERTY
    ]
    if lines:
        terminalreporter.section("agreement with eager hooks, by way of compiling")
        terminalreporter.write_line("\n".join(truth_table.table(lines)))
