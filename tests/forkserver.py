"""Start Python programs without paying for their imports: fork them from a process that has done these.

A forked program is a real process: own process id, session, environment, arguments, working directory,
standard streams and exit status, and it dies by real signals. It differs from `python -m MODULE` in what is
loaded when it starts, and in that the interpreter is not taken apart at its end. Tests of start-up, exit,
launchers and Slurm therefore start the real commands.

`python tests/forkserver.py FD` is the server, FD a listening socket. pytest starts one per test run
(tests/conftest.py). It imports at the first request, ends with its standard input, and kills a program whose
test process is gone.
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
    "pipeline.train.preflight",
    "pipeline.estimate.plan",
    "pipeline.estimate.bench_loader",
    "pipeline.evals.knn",
    "pipeline.evals.linprobe",
    "pipeline.pictures.reconstruct",
    "pipeline.report.page",
    "pipeline.export.command",
    "data_prep.builder",
    "data_prep.finalize",
    "data_prep.verify",
    "torch.utils.tensorboard.writer",
]
LONGEST = 600.0  # seconds after which a program hangs
ADDRESS = "SHARDMAE_FORKSERVER"
"""Environment variable that holds the server's socket."""


class ForkedProcess:
    """A running program. Has the part of subprocess.Popen's interface that tests need."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        stdout: IO | int | None = None,
        stderr: IO | int | None = None,
        ranks: Sequence[Mapping[str, str]] = (),
    ):
        """Start a program in a session of its own.

        Args:
            arguments: What follows `python`: "-m", module, ... or "-c", code, ...
            env: Environment, default this process's.
            stdout, stderr: As for subprocess.Popen: a file, subprocess.PIPE, DEVNULL or STDOUT.
            ranks: If given, the program is started once per entry, with these variables added, below a
                process that waits for all and exits as the lowest rank that failed (128 + number if by a
                signal).
        """
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
        self._replies = self._connection.makefile("r")
        started = json.loads(self._replies.readline())
        self.pid: int = started["pid"]
        self.rank_pids: list[int] = started["ranks"]
        self.returncode: int | None = None

    def _file(self, name: str, wanted: IO | int | None, inherited: int) -> int:
        if wanted == subprocess.PIPE:  # a file never fills up, so nobody has to read along
            self._captured[name] = tempfile.TemporaryFile()  # noqa: SIM115
            return self._captured[name].fileno()
        if wanted == subprocess.DEVNULL:
            self._captured[name] = open(os.devnull, "w+b")  # noqa: SIM115
            return self._captured[name].fileno()
        if wanted is None:
            return inherited
        return wanted if isinstance(wanted, int) else wanted.fileno()

    def wait(self, timeout: float | None = LONGEST) -> int:
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

    def communicate(self, timeout: float | None = LONGEST) -> tuple[str, str]:
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
    arguments: Sequence[str | Path], timeout: float | None = LONGEST, **options
) -> subprocess.CompletedProcess:
    """Start a program, wait for its end and return what it printed, as subprocess.run does."""
    process = ForkedProcess(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        output, errors = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


# ---- The server


def serve(listener: socket.socket) -> dict:
    """Answer requests until standard input ends. Returns only in a program's process: its request."""
    loaded = False
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        head, fds, *_ = socket.recv_fds(connection, 4, 2)
        if len(head) < 4:  # the test process was ended
            connection.close()
            continue
        request = json.loads(connection.makefile("rb").read(int.from_bytes(head, "big")))
        if not loaded:
            for module in PRELOAD:
                importlib.import_module(module)
            assert threading.active_count() == 1 and len(os.listdir("/proc/self/task")) == 1, (
                "a thread is lost by fork"
            )
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
    """Fork the program and report on it until it ends; returns the request in the program's own process."""
    os.setsid()  # a signal to the tests' process group leaves this process to clean up
    reading, writing = os.pipe()
    program = os.fork()
    if program == 0:
        connection.close()
        os.setsid()
        ranks = []
        for variables in request["ranks"]:
            ranks.append(os.fork())
            if not ranks[-1]:
                return _become({**request, "env": request["env"] | variables}, fds, [reading, writing])
        os.write(writing, json.dumps(ranks).encode() + b"\n")
        if ranks:
            os.close(writing)
            _exit_as(ranks)
        return _become(request, fds, [reading, writing])
    try:
        for fd in (writing, *fds):
            os.close(fd)
        ranks = json.loads(os.fdopen(reading).readline() or "[]")
        connection.sendall(json.dumps({"pid": program, "ranks": ranks}).encode() + b"\n")
        ended = os.pidfd_open(program)
        if ended in select.select([ended, connection], [], [])[0]:
            # Not reaped until the test process knows, so that the process id is not used again before.
            found = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
            code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            if request["ranks"]:  # none outlives the process that waits for them
                os.killpg(program, signal.SIGKILL)
            connection.sendall(json.dumps({"returncode": code}).encode() + b"\n")
            connection.recv(1)  # until it closes the connection
        else:  # the test process is gone
            os.killpg(program, signal.SIGKILL)
    except OSError:
        os.killpg(program, signal.SIGKILL)
    os._exit(0)


def _exit_as(ranks: list[int]) -> NoReturn:
    """Wait for all; exit with the code of the lowest rank that failed."""
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
    """Run "-m" MODULE or "-c" CODE and exit as Python does, but leave the memory to the kernel: to take apart
    all that is imported costs more than most programs."""
    option, program, *rest = arguments
    code: object = 0
    try:
        if option == "-m":
            sys.argv = [program, *rest]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # waits for threads, as the interpreter does before it calls what atexit was given
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0 if isinstance(code, int | None) else 1)


def start_server() -> subprocess.Popen:
    """Start the server; its address is in this process's environment, for itself and its children."""
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
