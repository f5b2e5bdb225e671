"""Keep what a benchmark found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def save_report(question: str, device: str, report: Mapping[str, object]) -> Path:
    """Write a report to ``results/``, one per question, kind of device and day."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}-{device}-{date.today()}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path
