"""Writes a run, one folder, from a background thread."""

from __future__ import annotations

import atexit
import errno
import json
import os
import platform
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, TypeAlias

from tmm.core.atomic_file import replace_text
from tmm.core.metrics import FloatArray
from tmm.core.records import StepRecord
from tmm.runtime.store.run_file import INFO_NAME, info_text, read_info

if TYPE_CHECKING:
    from tmm.runtime.store.segment_writer import SegmentWriter

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_STARTS = "starts"

Submission: TypeAlias = StepRecord | Callable[[], StepRecord]
Ended: TypeAlias = Callable[[Exception | None, BaseException | None, int | None], None]
"""Told why the recording failed, if it did, the exception that was being handled where the writer
was closed, and the last step that was written."""


class RunWriter:
    """Records steps into the folder ``path``, which it creates where it is missing.

    ``info`` becomes ``run.json``, where ``"starts"`` lists the processes that opened the run; of a
    run that exists, ``run.json`` is kept and gains a start, with what differs in ``info``. The
    first record starts the thread and a new segment, and calls ``started``, which may register an
    exit handler that runs before the writer's own. ``histogram_edges`` has shape (bins + 1,). With
    ``replaces_from``, what the run had recorded from that step on no longer counts once there is a
    first record. ``ended`` is called once, when nothing more will be written: by the thread, or by
    who closes or forgets a writer that recorded nothing.

    Of a run into which several ranks record their own rows, ``rank`` is the one of this process;
    only rank 0 writes what is not a segment.

    At most ``capacity`` records wait; where nothing gets written for ``stall_seconds``, a caller
    who needs room or closes gets a TimeoutError. A record that cannot be built, makes no sense or
    cannot be stored ends the recording: the next call of `submit`, `raise_pending` or `close`
    raises the reason in the training thread, and every later `submit` and `raise_pending` does so
    again. What was flushed before stays readable.

    A writer that nobody closes writes what was submitted, at the latest when the interpreter
    exits. In a forked child `close` does nothing and the other methods raise RuntimeError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        info: Mapping[str, object],
        histogram_edges: FloatArray | None = None,
        capacity: int = 64,
        stall_seconds: float = 60.0,
        replaces_from: int | None = None,
        started: Callable[[], None] | None = None,
        ended: Ended | None = None,
        rank: int | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, not {capacity}")
        import h5py  # noqa: F401 - here, so that its exit handler runs after that of the writer

        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._is_first = not rank
        if self._is_first:
            _add_start(self.path, info)
        self._edges, self._replaces_from = histogram_edges, replaces_from
        self._started = started
        self._channel = _Channel(self.path, capacity, stall_seconds, ended, rank)
        self._thread: threading.Thread | None = None
        # Only a signal, no join: the garbage collector may run in the middle of anything.
        weakref.finalize(self, _forget, self._channel).atexit = False

    def submit(self, record: Submission, *, wait_seconds: float = 0.0) -> bool:
        """Hand over one step, or a function that the writer's thread calls to get it.

        Waits up to ``wait_seconds`` for the record to be flushed and tells whether it was; what
        is flushed outlives this process. The arrays of a record must not change any more.

        Raises OSError, naming the file and the step, where the storage failed; TimeoutError, an
        OSError too, where it stalls; RuntimeError after a wrong record and after `close`.
        """
        self._refuse_child()
        channel = self._channel
        ticket = channel.put(record)
        with channel.changed:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_write_all,
                    args=(channel, self._edges, self._replaces_from),
                    name="tmm-writer",
                    daemon=True,
                )
                channel.has_thread = True
                # Not weakref.finalize, which may come after h5py's own exit handler: that one
                # changes HDF5's tables without a lock.
                atexit.register(channel.finish)
                self._thread.start()
                if self._started is not None:
                    self._started()
        return wait_seconds > 0 and channel.wait_written(ticket, wait_seconds)

    def flush(self) -> None:
        """Wait until everything submitted is written; raises as `submit` does."""
        self._refuse_child()
        self._channel.wait_all_written()

    def raise_pending(self) -> None:
        """Raise what went wrong in the thread, as `submit` does."""
        self._refuse_child()
        self._channel.raise_failure()

    def replace_from(self, step: int) -> None:
        """What the run had recorded from ``step`` on no longer counts, once there is a record.

        Nothing happens after the first record of this writer.
        """
        if self._thread is None:
            known = self._replaces_from
            self._replaces_from = step if known is None else min(step, known)

    def describe(self, info: Mapping[str, object]) -> dict[str, object]:
        """Keep more of the process in ``run.json``; gives what was said before and differs now.

        Raises OSError and ValueError as the constructor does.
        """
        self._refuse_child()
        return _describe(self.path, info) if self._is_first else {}

    @property
    def submitted(self) -> int:
        """How many records were handed over."""
        return self._channel._put

    @property
    def failure(self) -> Exception | None:
        """What ended the recording, if something did."""
        return self._channel._failure

    def write_text(self, name: str, text: str) -> None:
        """Write a small file into the run, whole or not at all; raises OSError at once.

        Nothing happens once the recording has failed: somebody else may go on with the run.
        """
        self._refuse_child()
        plain = name and Path(name).name == name and not name.startswith(".")
        if not plain or name == INFO_NAME or name.endswith(".h5"):
            raise ValueError(f"a run cannot take a text under the name {name!r}")
        if self.failure is None and self._is_first:
            replace_text(self.path / name, text)

    def close(self) -> None:
        """Write what was submitted and end the thread; a second call does nothing.

        Raises what `submit` would raise, unless it did.
        """
        if not self._channel.ended:
            self._channel.handled = sys.exception()
            self._channel.forget()
            if self._thread is not None:
                atexit.unregister(self._channel.finish)
                self._channel.finish()

    def _refuse_child(self) -> None:
        if self._channel.process != os.getpid():
            raise RuntimeError(
                f"the run {self.path} belongs to process {self._channel.process}: "
                "a child forked from it cannot record into it"
            )

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Channel:
    """What the training thread and the writer's thread share, so that neither holds the other."""

    def __init__(
        self,
        path: Path,
        capacity: int,
        stall_seconds: float,
        tell_end: Ended | None,
        rank: int | None,
    ) -> None:
        self.path = path
        self.rank = rank
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.ended = False  # no more is put
        self.has_thread = False  # which tells the end
        self.last_step: int | None = None
        self.handled: BaseException | None = None
        self._tell_end = tell_end
        self._capacity, self._stall_seconds = capacity, stall_seconds
        self._waiting: deque[Submission] = deque()
        self._put = self._written = 0
        self._stopped = False  # no more is taken
        self._failure: Exception | None = None
        self._raised = False

    def put(self, submission: Submission) -> int:
        """Queue it and return its number, which `wait_written` takes."""
        with self.changed:
            self._wait_while(lambda: len(self._waiting) >= self._capacity and not self._stopped)
            self.raise_failure()
            if self.ended:
                raise RuntimeError(f"the writer of the run {self.path} is closed")
            self._waiting.append(submission)
            self._put += 1
            self.changed.notify_all()
            return self._put

    def take(self) -> Submission | None:
        """Wait for the next one; None says that there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self._waiting or self.ended)
            if not self._waiting:
                return None
            self.changed.notify_all()
            return self._waiting.popleft()

    def mark_written(self, step: int | None) -> None:
        """A record was written, that of ``step`` or of events alone."""
        with self.changed:
            self._written += 1
            self.last_step = self.last_step if step is None else step
            self.changed.notify_all()

    def wait_written(self, number: int, seconds: float) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self._written >= number or self._stopped, seconds)
            if self._written < number:
                self.raise_failure()
            return self._written >= number

    def wait_all_written(self) -> None:
        with self.changed:
            self._wait_while(lambda: self._written < self._put and not self._stopped)
            self.raise_failure()

    def stop(self, failure: Exception | None) -> None:
        """Say that the thread takes no more, and why."""
        with self.changed:
            self._stopped, self._failure = True, failure
            self._waiting.clear()
            self.changed.notify_all()

    def end(self) -> None:
        """Say that no more is put."""
        if self.process == os.getpid():  # a child may have inherited the lock locked
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def forget(self) -> None:
        """As `end`, and say so if nothing was recorded."""
        self.end()
        if not self.has_thread and self.process == os.getpid():
            self.tell_end(None)

    def tell_end(self, failure: Exception | None) -> None:
        """Say, once, that nothing more will be written."""
        tell, self._tell_end = self._tell_end, None
        handled, self.handled = self.handled, None
        if tell is not None:
            tell(failure, handled, self.last_step)

    def finish(self) -> None:
        """End, wait for the thread and raise what was not raised yet."""
        if self.process == os.getpid():
            self.end()
            with self.changed:
                self._wait_while(lambda: not self._stopped)
                if not self._raised:
                    self.raise_failure()

    def raise_failure(self) -> None:
        if self._failure is not None:
            self._raised = True
            if isinstance(self._failure, OSError):
                raise OSError(self._failure.errno, self._failure.strerror) from self._failure
            message = f"the recording into {self.path} has ended: {self._failure}"
            raise RuntimeError(message) from self._failure

    def _wait_while(self, blocked: Callable[[], bool]) -> None:
        while blocked():
            if not self.changed.wait(self._stall_seconds) and blocked():
                reason = f"nothing was written to {self.path} for {self._stall_seconds} s"
                raise TimeoutError(errno.ETIMEDOUT, reason)


def _forget(channel: _Channel) -> None:
    with suppress(OSError):  # there is nobody to tell, and nothing that was recorded is lost
        channel.forget()


def _write_all(channel: _Channel, edges: FloatArray | None, replaces_from: int | None) -> None:
    failure: Exception | None = RuntimeError("something ended the writer's thread")
    try:
        _write_until_end(channel, edges, replaces_from)
        failure = None
        atexit.unregister(channel.finish)
    except Exception as error:  # whatever it is, the training thread raises it
        clear_frames(error.__traceback__)
        failure = error
    finally:
        try:
            channel.tell_end(failure)
        except Exception as error:  # as above
            failure = failure or error
        # Last of all, and with every HDF5 object gone: the interpreter may exit at once, and a
        # thread that it ends inside of h5py holds h5py's lock for ever.
        channel.stop(failure)


def _write_until_end(
    channel: _Channel, edges: FloatArray | None, replaces_from: int | None
) -> None:
    segment: SegmentWriter | None = None
    with ExitStack() as stack:
        while (submission := channel.take()) is not None:
            record = _built(submission)
            if segment is None:
                created = _segment_for(channel, record, edges, replaces_from)
                segment = stack.enter_context(closing(created))
            segment.write(record)
            channel.mark_written(record.step if record.scalars or record.histograms else None)
            del submission, record  # so that their memory need not wait for the next ones


def _built(submission: Submission) -> StepRecord:
    if not callable(submission):
        return submission
    try:
        return submission()
    except Exception as error:
        raise RuntimeError(f"a record could not be built: {error!r}") from error


def _segment_for(
    channel: _Channel, record: StepRecord, edges: FloatArray | None, replaces_from: int | None
) -> SegmentWriter:
    from tmm.runtime.store.segment_writer import SegmentWriter

    keys = sum(len(table.infos) for table in record.scalars)
    widths = [table.values.shape[-1] for table in record.histograms]
    bins = widths[0] if widths else 64 if edges is None else len(edges) - 1
    return SegmentWriter(
        channel.path,
        keys=keys,
        bins=max(1, bins),
        histogram_edges=edges,
        replaces_from=replaces_from,
        rank=channel.rank,
    )


def is_info_of_run(info: Mapping[str, Any]) -> bool:
    """Whether a file of the name of ``run.json`` is one that a writer keeps."""
    return isinstance(info.get(_STARTS), list)


def _add_start(folder: Path, info: Mapping[str, object]) -> None:
    if _STARTS in info:
        raise ValueError("info must not hold 'starts', which the writer keeps")
    given: dict[str, Any] = json.loads(json.dumps(dict(info)))
    start: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "process": os.getpid(),
    }
    with _locked(folder):
        if (folder / INFO_NAME).exists():
            known = read_info(folder)
            if not is_info_of_run(known):
                raise ValueError(f"{folder / INFO_NAME} is of another program: it is no run's")
            changed = {key: value for key, value in given.items() if known.get(key) != value}
            start |= {"info": changed} if changed else {}
        else:
            known = {**given, _STARTS: []}
        known[_STARTS].append(start)
        _replace_info(folder, known)


def _describe(folder: Path, info: Mapping[str, object]) -> dict[str, object]:
    """Add ``info`` to the newest start, as far as it differs from what was said before."""
    given: dict[str, Any] = json.loads(json.dumps(dict(info)))
    with _locked(folder):
        known = read_info(folder)
        said = dict(known)
        for start in known[_STARTS]:
            said |= start.get("info") or {}
        new = {key: value for key, value in given.items() if key not in said}
        before = {key: said[key] for key in given.keys() - new.keys() if said[key] != given[key]}
        known |= new
        if before:
            newest = known[_STARTS][-1]
            newest["info"] = (newest.get("info") or {}) | {key: given[key] for key in before}
        _replace_info(folder, known)
    return before


def _replace_info(folder: Path, info: Mapping[str, Any]) -> None:
    replace_text(folder / INFO_NAME, info_text(info))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing ``run.json`` at the same time, where that is possible."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
