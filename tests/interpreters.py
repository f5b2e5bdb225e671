"""Interpreters in which tmm is imported already: forked from one that does nothing else.

Starting Python and importing torch takes seconds; a fork takes milliseconds. What a child runs is
its ``__main__``, at the bottom of its stack: exceptions nobody caught, ``sys.exit``, ``atexit``,
threads and signals do what they do in an interpreter of its own.
"""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
LONG = 120.0
"""Seconds after which a child is killed, and its test fails."""


def leave_guards_untimed() -> None:
    """Dynamo empties the processor's caches after each compilation to time its guards for a log."""
    from torch._dynamo import guards

    guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[assignment]


def collect_garbage_seldom() -> None:
    """Tracing makes so many objects that looking for garbage takes a tenth of its time."""
    gc.set_threshold(50_000)


@dataclass(frozen=True)
class Request:
    """What a child is to run, and where."""

    program: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    has_terminal: bool
    warns: bool


class Interpreter:
    """A child that runs a program, in the manner of ``subprocess.Popen``."""

    def __init__(self, status: socket.socket, errors: IO[str], stdin: int, stdout: int) -> None:
        self._status, self._errors = status, errors
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.pid = int(self._told(LONG))
        self.returncode: int | None = None

    def _told(self, seconds: float) -> str:
        self._status.settimeout(seconds)
        text = self._status.recv(64).decode()
        assert text, "the server of interpreters has ended"
        return text

    def wait(self, timeout: float = LONG) -> int:
        """Its exit code, or the negative number of the signal that has ended it."""
        if self.returncode is None:
            self.returncode = int(self._told(timeout))
        return self.returncode

    def poll(self) -> int | None:
        """The same, or None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and its server is about to say so
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def read_errors(self) -> str:
        """What it has written to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def communicate(self, timeout: float = LONG) -> tuple[str, str]:
        """What it writes until its end, to stdout and to stderr."""
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self.kill()))
        timer.start()
        try:
            self.stdin.close()
            output = self.stdout.read()
            self.wait(timeout)
        finally:
            timer.cancel()
        assert not late.is_set(), f"it still ran after {timeout} s: {self.read_errors()}"
        return output, self.read_errors()

    def close(self) -> None:
        """End it, if it has not ended."""
        self.kill()
        self.wait()
        for file in (self.stdin, self.stdout, self._errors, self._status):
            with suppress(BrokenPipeError):  # what it never read
                file.close()


class Interpreters:
    """A server of interpreters; ``settings`` are variables that torch or tmm read when imported."""

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                cwd=ROOT,
                env=os.environ | settings,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self._channel.close()
        self._server.wait(LONG)

    def start(
        self,
        program: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        terminal: int | None = None,
        warns: bool = True,
    ) -> Interpreter:
        """Run ``program`` as ``python -c`` would, in the terminal of that file descriptor if any.

        With ``warns=False`` as ``python -W ignore -c`` would.
        """
        request = Request(
            program,
            tuple(map(str, arguments)),
            dict(os.environ | self._settings if environment is None else environment),
            str(folder or Path.cwd()),
            terminal is not None,
            warns,
        )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        (their_input, our_input), (our_output, their_output) = os.pipe(), os.pipe()
        with tempfile.TemporaryFile() as asked:
            asked.write(pickle.dumps(request))
            asked.seek(0)
            given = [their_input, their_output, errors.fileno()]
            standard = given if terminal is None else [terminal] * 3
            socket.send_fds(self._channel, [b"x"], [*standard, theirs.fileno(), asked.fileno()])
        for number in (their_input, their_output):
            os.close(number)
        theirs.close()
        return Interpreter(ours, errors, our_input, our_output)

    def run(
        self, program: str, *arguments: object, timeout: float = LONG, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run ``program`` to its end, as ``start`` does."""
        with closing(self.start(program, *arguments, **options)) as child:
            output, errors = child.communicate(timeout)
            return subprocess.CompletedProcess(program, child.wait(), output, errors)

    def run_ranks(
        self, ranks: int, program: str, *arguments: object, timeout: float = LONG, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run ``program`` in that many processes, told what torchrun tells them.

        As under torchrun, one that fails ends the others. Gives the first exit code that is not
        zero, and what all have written to stderr.
        """
        with _told_by_torchrun(ranks) as told:
            children = [
                self.start(program, *arguments, environment=environment, **options)
                for environment in told
            ]
            try:
                code = _first_failure(children, time.monotonic() + timeout)
                errors = "".join(child.read_errors() for child in children)
            finally:
                for child in children:
                    child.close()
        return subprocess.CompletedProcess(program, code, "", errors)


@contextmanager
def _told_by_torchrun(ranks: int) -> Iterator[list[dict[str, str]]]:
    """The environment of each rank; what they meet in is kept here, as torchrun does."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield [
        {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(ranks)
    ]
    del store


def _first_failure(children: list[Interpreter], end: float) -> int:
    while time.monotonic() < end:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            for child in children:
                child.send_signal(signal.SIGTERM)
            for child in children:
                child.wait(LONG)
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.01)
    raise TimeoutError("the ranks still ran: " + "".join(child.read_errors() for child in children))


# The server


def serve(channel: socket.socket) -> Request | None:
    """Fork for each request; gives one in the child that is to run it, and None at the end."""
    ended, woken = os.pipe()
    for number in (ended, woken):
        os.set_blocking(number, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    running: dict[int, int] = {}  # where to tell the status of each child
    while True:
        ready, _, _ = select.select([channel, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _tell_ends(running)
        if channel not in ready:
            continue
        asked, numbers, _, _ = socket.recv_fds(channel, 1, 5)
        if not asked:
            for child in running:  # of a test that was ended
                os.kill(child, signal.SIGKILL)
            return None
        *standard, status, file = numbers
        with os.fdopen(file, "rb") as pickled:
            request: Request = pickle.load(pickled)
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _take(standard, has_terminal=request.has_terminal)
            for number in {ended, woken, channel.detach(), status, *standard, *running.values()}:
                if number > 2:
                    os.close(number)
            return request
        os.write(status, b"%d" % child)
        running[child] = status
        for number in set(standard):
            os.close(number)


def _tell_ends(running: dict[int, int]) -> None:
    for child in list(running):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            told = running.pop(child)
            os.write(told, b"%d" % os.waitstatus_to_exitcode(status))
            os.close(told)


def _take(standard: list[int], *, has_terminal: bool) -> None:
    """These are stdin, stdout and stderr from now on."""
    for place, number in enumerate(standard):
        os.dup2(number, place)
    if has_terminal:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, name in enumerate(("stdin", "stdout", "stderr")):
        lines = place == 2 or (place == 1 and os.isatty(place))
        file = os.fdopen(
            place,
            "w" if place else "r",
            1 if lines else -1,
            errors="backslashreplace" if place == 2 else None,
            closefd=False,
        )
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)


def become(request: Request) -> tuple[Callable[..., Any], ...]:
    """Make this process what the request says; gives the program, compiled, and its names."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    sys.argv = ["-c", *request.arguments]
    sys.path[0] = ""
    if not request.warns:
        warnings.simplefilter("ignore")
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    return compile(request.program, "<string>", "exec"), vars(main)  # type: ignore[return-value]


if __name__ == "__main__":
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    import tmm.cli

    pick_vec_isa()  # asks a process of its own what this machine can, and remembers it
    for _name in tmm.__all__:  # imported when it is first asked for
        getattr(tmm, _name)
    leave_guards_untimed()
    collect_garbage_seldom()
    gc.collect()
    gc.freeze()  # what all children share is neither looked at nor copied at their ends
    _request = serve(socket.socket(fileno=int(sys.argv[1])))
    if _request is not None:
        exec(*become(_request))
