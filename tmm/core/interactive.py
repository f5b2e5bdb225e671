"""Whether a program is typed as it runs: in a notebook, or at a prompt."""

from __future__ import annotations

import sys


def is_interactive() -> bool:
    """Whether cells or lines of the program are run one by one, and some of them again."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None or hasattr(sys, "ps1")
