"""Start Python programs quickly, by forking a process that has already imported their modules.

A forked program is a real process with its own process id, session, environment, arguments, working directory, standard
streams and exit status, and real signals end it. It differs from `python -m MODULE` in the modules that are loaded when
it starts, and in that the interpreter is not finalized. Tests of start-up, exit, launchers and Slurm start the real
commands instead.

`python tests/forkserver.py FD` is the server; FD is a listening socket. pytest starts one per test run
(tests/conftest.py). It imports the modules at the first request, exits when its standard input is closed, and kills a
program if its test process has exited.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import numpy as np

ROOT = Path(__file__).parents[1]
PRELOAD = [
    "pipeline.tasks.pretraining",
    "pipeline.tasks.classification",
    "pipeline.tasks.detection",
    "pipeline.tasks.segmentation",
    "pipeline.tasks.registry",
    "pipeline.train.preflight",
    "pipeline.estimate.plan",
    "pipeline.estimate.bench_loader",
    "pipeline.evals.knn",
    "pipeline.evals.linprobe",
    "pipeline.pictures.reconstruct",
    "pipeline.report.page",
    "pipeline.export.command",
    "data_prep.adopt",
    "data_prep.builder",
    "data_prep.finalize",
    "data_prep.sources.webdataset",
    "data_prep.verify",
    "torch.utils.tensorboard.writer",
]
MAX_DURATION_S = 600.0
"""A program that takes longer is considered to hang."""
ADDRESS = "SHARDMAE_FORKSERVER"
"""Environment variable that holds the server's socket."""


class ForkedProcess:
    """A running program, with the part of subprocess.Popen's interface that tests need.

    Args:
        arguments: What follows `python`: "-m", module, ... or "-c", code, ...
        env: The environment; default: this process's.
        stdout, stderr: As for subprocess.Popen: a file, subprocess.PIPE, DEVNULL or STDOUT.
        ranks: If given, start the program once per entry, with these variables added, as children of a process that
            waits for all of them and exits with the code of the lowest rank that failed (128 + number for a signal).
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO | int | None = None,
        stderr: IO | int | None = None,
        ranks: Sequence[Mapping[str, str]] = (),
    ):
        self._captured: dict[str, IO[bytes]] = {}
        output = self._file("stdout", stdout, 1)
        errors = output if stderr == subprocess.STDOUT else self._file("stderr", stderr, 2)
        request = {
            "arguments": [str(word) for word in arguments],
            "env": dict(os.environ if env is None else env),
            "cwd": os.getcwd(),
            "ranks": [dict(rank) for rank in ranks],
        }
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(os.environ[ADDRESS])
        message = json.dumps(request).encode()
        socket.send_fds(self._connection, [len(message).to_bytes(4, "big")], [output, errors])
        self._connection.sendall(message)
        self._replies = self._connection.makefile("rb", buffering=0)  # wait() looks for the second reply in the socket
        started = json.loads(self._replies.readline())
        self.pid: int = started["pid"]
        self.rank_pids: list[int] = started["ranks"]
        self.returncode: int | None = None

    def _file(self, name: str, target: IO | int | None, inherited: int) -> int:
        if target == subprocess.PIPE:  # a file instead, which does not have to be read while the program runs
            self._captured[name] = tempfile.TemporaryFile()  # noqa: SIM115
            return self._captured[name].fileno()
        if target == subprocess.DEVNULL:
            self._captured[name] = open(os.devnull, "w+b")  # noqa: SIM115
            return self._captured[name].fileno()
        if target is None:
            return inherited
        return target if isinstance(target, int) else target.fileno()

    def wait(self, timeout: float | None = MAX_DURATION_S) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = json.loads(self._replies.readline())["returncode"]
            self._replies.close()
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = MAX_DURATION_S) -> tuple[str, str]:
        self.wait(timeout)
        texts = []
        for name in ("stdout", "stderr"):
            file = self._captured.get(name)
            if file:
                file.seek(0)
            texts.append(file.read().decode() if file else "")
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str | Path], timeout: float | None = MAX_DURATION_S, **options
) -> subprocess.CompletedProcess:
    """Run a program to its end and return its output, as subprocess.run does."""
    process = ForkedProcess(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


# ---- The server


class _Program(NamedTuple):
    """A program that runs, or whose end has not been reaped."""

    pid: int
    has_ranks: bool
    connection: socket.socket
    """To the test process."""
    ended: int
    """File descriptor that is readable after the end."""

    def report_end(self) -> None:
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        if self.has_ranks:  # no rank outlives the process that waits for them
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps({"returncode": code}).encode() + b"\n")

    def kill(self) -> None:
        """Kill the program, if it still runs, and reap it. After that its process id may be used again."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        self.connection.close()
        os.close(self.ended)


def serve(listener: socket.socket) -> dict:
    """Answer requests until standard input is closed. Returns only in a program's process, with its request."""
    loaded = False
    programs: list[_Program] = []
    reported: list[_Program] = []
    while True:
        connections = [program.connection for program in programs]
        running = [program.ended for program in programs if program not in reported]
        ready = select.select([listener, sys.stdin, *connections, *running], [], [])[0]
        for program in list(programs):
            if program.ended in ready:
                program.report_end()
                reported.append(program)
            elif program.connection in ready or sys.stdin in ready:  # the test process has its result, or was killed
                program.kill()
                programs.remove(program)
                reported = [other for other in reported if other is not program]
        if sys.stdin in ready:
            os._exit(0)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        head, fds, *_ = socket.recv_fds(connection, 4, 2)
        if len(head) < 4:  # the test process was killed
            connection.close()
            continue
        request = json.loads(connection.makefile("rb").read(int.from_bytes(head, "big")))
        if not loaded:
            for module in PRELOAD:
                importlib.import_module(module)
            assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1, "fork would lose a thread"
            gc.freeze()
            for finalizer in weakref.finalize._registry.values():  # type: ignore[attr-defined]
                finalizer.atexit = False  # torch's are slow, and temporary folders of the server are not the program's
            loaded = True
        sys.stdout.flush()
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            for inherited in (listener, connection, *programs):
                inherited.close()
            return _start(request, fds, [read_fd, write_fd])
        for fd in (write_fd, *fds):
            os.close(fd)
        with os.fdopen(read_fd) as file:
            ranks = json.loads(file.readline() or "[]")
        programs.append(_Program(pid, bool(ranks), connection, os.pidfd_open(pid)))
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"pid": pid, "ranks": ranks}).encode() + b"\n")


def _start(request: dict, fds: list[int], pipe: list[int]) -> dict:
    """Become the program, or fork its ranks, write their process ids to the pipe, and wait for them."""
    os.setsid()
    ranks = []
    for variables in request["ranks"]:
        ranks.append(os.fork())
        if not ranks[-1]:
            return _become({**request, "env": request["env"] | variables}, fds, pipe)
    os.write(pipe[1], json.dumps(ranks).encode() + b"\n")
    if ranks:
        os.close(pipe[1])
        _exit_as(ranks)
    return _become(request, fds, pipe)


def _exit_as(ranks: list[int]) -> NoReturn:
    """Wait for all ranks, and exit with the code of the lowest one that failed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    code = next((code for code in codes if code), 0)
    os._exit(code if code >= 0 else 128 - code)


def _become(request: dict, fds: list[int], unused: list[int]) -> dict:
    """Give this process the request's environment, working directory and standard streams."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for fd in {*fds, *unused}:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    np.random.seed()
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.path[1:1] = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry]
    return request


def execute(arguments: list[str]) -> NoReturn:
    """Run "-m" MODULE or "-c" CODE and exit as Python does, without finalizing the imported modules, which is slow."""
    option, program, *rest = arguments
    code: object = 0
    try:
        if option == "-m":
            sys.argv = [program, *rest]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as exit_request:
        code = exit_request.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # waits for threads, as the interpreter does before it calls the functions of atexit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0 if isinstance(code, int | None) else 1)


def start_server() -> subprocess.Popen:
    """Start the server, and put its address into the environment of this process and its children."""
    os.environ[ADDRESS] = os.path.join(tempfile.mkdtemp(), "socket")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[ADDRESS])
        listener.listen(64)
        command = [sys.executable, __file__, str(listener.fileno())]
        options = {"start_new_session": True}  # Ctrl-C must not end it: it kills the programs
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], **options
        )


if __name__ == "__main__":
    execute(serve(socket.socket(fileno=int(sys.argv[1])))["arguments"])
