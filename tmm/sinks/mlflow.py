"""Values in MLflow."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import unquote

from tmm.runs.delivery import RunInfo, Value
from tmm.runs.state import Status
from tmm.sinks.common import check_keys, numbers, require

_RUN_TAG, _STEP_TAG = "tmm.run", "tmm.step"
_BATCH = 1000  # metrics that MLflow takes at once
_PARAMETERS = 100  # likewise
_NAME_LENGTH, _VALUE_LENGTH = 250, 6000  # the longest that MLflow takes
_REFUSED = re.compile(rb"[^A-Za-z0-9_\-./ ]")


@dataclass(frozen=True)
class MLflowSink:
    """Logs to a run of MLflow with the name, configuration (as parameters) and tags of the run.

    MLflow's own active run is left alone. ``metric_name`` says how keys are written there. NaN is
    kept; infinities are in a file store, a database has ±1.8e308. Histograms are left out. MLflow
    keeps all that it was given: what comes again of a step, as in a resumed run, is not logged
    again.

    Attributes:
        tracking_uri: the server or database; that of ``mlflow`` without it.
        experiment: its name; the project of the run without it.
        keys: regular expression (``re.match``) of the keys to log; all of them without it.
    """

    tracking_uri: str | None = None
    experiment: str | None = None
    keys: str | None = None

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def open(self, run: RunInfo) -> OpenMLflow:
        """Start or resume the run of MLflow; raises ImportError and MLflow's errors."""
        mlflow = require("mlflow", "mlflow")
        client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        experiment = _experiment(client, self.experiment or run.project)
        same = f"tags.`{_RUN_TAG}` = '{run.id}'"
        if run.resumed and (found := client.search_runs([experiment], filter_string=same)):
            known = found[0]
            client.update_run(known.info.run_id, status="RUNNING")
            last = known.data.tags.get(_STEP_TAG)
            first_step = 0 if last is None else int(last) + 1
            return OpenMLflow(mlflow, client, known.info.run_id, self.keys, first_step)
        tags = {_RUN_TAG: run.id, "mlflow.note.content": run.notes}
        tags |= {metric_name(tag): "" for tag in run.tags}
        created = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        parameters = [
            mlflow.entities.Param(metric_name(key), str(value)[:_VALUE_LENGTH])
            for key, value in run.config.items()
        ]
        for start in range(0, len(parameters), _PARAMETERS):
            client.log_batch(created, params=parameters[start : start + _PARAMETERS])
        return OpenMLflow(mlflow, client, created, self.keys, 0)


class OpenMLflow:
    """One run of MLflow; steps before ``first_step`` are there already."""

    def __init__(
        self, mlflow: Any, client: Any, run: str, keys: str | None, first_step: int
    ) -> None:
        self._mlflow, self._client, self._run = mlflow, client, run
        self._keys, self._next_step = keys, first_step
        self._known: set[str] | None = None  # keys of the step before that, if it is of this start
        self._may_be_there = True

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        """Log the numbers of a step, or those that are added to the last one."""
        if step >= self._next_step:
            self._known = set()
        elif self._known is None or step < self._next_step - 1:
            return
        found = {k: v for k, v in numbers(values, self._keys).items() if k not in self._known}
        self._known |= found.keys()
        now = int(time.time() * 1000)
        entities = self._mlflow.entities
        metrics = [
            entities.Metric(metric_name(key), value, now, step) for key, value in found.items()
        ]
        # What arrives last says that the step is whole. The first one may have arrived before the
        # process was killed, without that.
        tag = entities.RunTag(_STEP_TAG, str(step))
        for start in range(0, max(1, len(metrics)), _BATCH):
            part = metrics[start : start + _BATCH]
            if self._may_be_there and part and self._holds(part[0]):
                part = []
            is_last = start + _BATCH >= len(metrics)
            self._client.log_batch(self._run, metrics=part, tags=[tag] if is_last else [])
        self._next_step, self._may_be_there = step + 1, False

    def _holds(self, metric: Any) -> bool:
        history = self._client.get_metric_history(self._run, metric.key)
        return any(known.step == metric.step for known in history)

    def close(self, status: Status) -> None:
        """Say how the run ended."""
        ended = "FAILED" if status == "failed" else "FINISHED"
        self._client.set_terminated(self._run, status=ended)


def metric_name(key: str) -> str:
    """What a key is called in MLflow, which takes no brackets, among others.

    Other characters than ASCII letters, digits, ``_-./`` and spaces are written as in addresses of
    web pages, with a colon for the percent sign: ``[root module]`` is ``:5Broot module:5D``. So are
    the dots and slashes of a key that is no clean path, such as ``a//b``. Different keys have
    different names; one that would be too long for MLflow ends in a hash.
    """
    name = _REFUSED.sub(_quoted, key.encode("utf-8", "surrogatepass")).decode()
    if posixpath.normpath(name) != name or name.startswith(("..", "/")) or name == ".":
        name = re.sub(rb"[./]", _quoted, name.encode()).decode()
    if len(name) > _NAME_LENGTH:
        mark = sha256(name.encode()).hexdigest()[:32]
        name = f"{name[: _NAME_LENGTH - 1 - len(mark)]}:{mark}"
    return name


def key_of(name: str) -> str:
    """The key that has that name in MLflow, unless the name was shortened."""
    return unquote(name.replace(":", "%"), errors="surrogatepass")


def _quoted(match: re.Match[bytes]) -> bytes:
    return b":%02X" % match[0][0]


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    identity: str = client.create_experiment(name) if found is None else found.experiment_id
    return identity
