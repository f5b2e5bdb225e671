"""What processes do that are killed or whose disk is full; and what they are to have written."""

import ctypes
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np

from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runtime.store.run_writer import RunWriter

LONG = 60.0
STEPS = 80  # that a process writes, if it lives to write them
DONE = "done"


def info(key, position):
    return KeyInfo(key, "k", key, position, "mean")


def values(step, trial):
    """Of which step and trial they are; more keys as steps go on, and gaps."""
    random_values = np.random.default_rng((step, trial)).standard_normal(20 + step // 3)
    known = {f"k/{i}": value for i, value in enumerate(random_values.tolist()) if (i + step) % 4}
    return {"trial": float(trial), **known}


def histogram(step, trial):
    return [step + i / 1024 + trial for i in range(10)]


def record(step, trial):
    known = values(step, trial)
    infos = tuple(info(key, i) for i, key in enumerate(known))
    histograms = ()
    if step % 5 == 0:
        histograms = (Table((info("h", 1000),), np.array([histogram(step, trial)])),)
    return StepRecord(step, (Table(infos, np.array(list(known.values()))),), histograms)


def write_until_killed(path, first, trial):
    """Say which steps were flushed."""
    writer = RunWriter(Path(path), info={"id": "x"})
    for step in range(first, first + STEPS):
        if writer.submit(record(step, trial), wait_seconds=LONG):
            print(step, flush=True)
    print(DONE, flush=True)
    time.sleep(LONG)


def fill_disk(path, limit):
    """Say which steps were flushed to a disk that takes ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    writer = RunWriter(Path(path), info={})
    with suppress(OSError):
        for step in range(STEPS):
            if writer.submit(record(step, 0), wait_seconds=LONG):
                print(step, flush=True)
    with suppress(OSError):
        writer.close()
    ctypes.CDLL(h5py.h5.__file__).H5close()  # what HDF5 does when a process exits
    os._exit(0)
