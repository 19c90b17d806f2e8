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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

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


def serve(listener: socket.socket) -> dict:
    """Answer requests until standard input is closed. Returns only in a program's process, with its request."""
    loaded = False
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
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
            loaded = True
        sys.stdout.flush()
        if os.fork() == 0:
            listener.close()
            if program := _handle(connection, request, fds):
                return program
        connection.close()
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _handle(connection: socket.socket, request: dict, fds: list[int]) -> dict | None:
    """Fork the program and report its process ids and its end. Returns the request in the program's process."""
    os.setsid()  # a signal to the tests' process group must not end this process, which cleans up
    read_fd, write_fd = os.pipe()
    program = os.fork()
    if program == 0:
        connection.close()
        os.setsid()
        ranks = []
        for variables in request["ranks"]:
            ranks.append(os.fork())
            if not ranks[-1]:
                return _become({**request, "env": request["env"] | variables}, fds, [read_fd, write_fd])
        os.write(write_fd, json.dumps(ranks).encode() + b"\n")
        if ranks:
            os.close(write_fd)
            _exit_as(ranks)
        return _become(request, fds, [read_fd, write_fd])
    try:
        for fd in (write_fd, *fds):
            os.close(fd)
        ranks = json.loads(os.fdopen(read_fd).readline() or "[]")
        connection.sendall(json.dumps({"pid": program, "ranks": ranks}).encode() + b"\n")
        ended = os.pidfd_open(program)
        if ended in select.select([ended, connection], [], [])[0]:
            # Reaped only after the test process was informed, so that the process id is not reused earlier.
            status = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
            assert status is not None
            code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
            if request["ranks"]:  # no rank outlives the process that waits for them
                os.killpg(program, signal.SIGKILL)
            connection.sendall(json.dumps({"returncode": code}).encode() + b"\n")
            connection.recv(1)  # until it closes the connection
        else:  # the test process has exited
            os.killpg(program, signal.SIGKILL)
    except OSError:
        os.killpg(program, signal.SIGKILL)
    os._exit(0)


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
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])


if __name__ == "__main__":
    execute(serve(socket.socket(fileno=int(sys.argv[1])))["arguments"])
