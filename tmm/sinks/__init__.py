"""Sinks: what takes the values of a run besides its own files.

``tmm.start_run(sinks=[tmm.sinks.WandbSink(project="gpt"), "tensorboard"])`` uses them, with options
or by name. Packages are imported when a run starts; docs/how-to/sinks.md says what each backend
keeps.
"""

from tmm.runs.delivery import OpenSink, RunInfo, RunSink, Sink
from tmm.sinks.csv import CSVSink
from tmm.sinks.jsonl import JSONLinesSink
from tmm.sinks.mlflow import MLflowSink
from tmm.sinks.tensorboard import TensorBoardSink
from tmm.sinks.wandb import WandbSink

__all__ = [
    "CSVSink",
    "JSONLinesSink",
    "MLflowSink",
    "OpenSink",
    "RunInfo",
    "RunSink",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
]
