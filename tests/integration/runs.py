"""Real runs: the processes of one rank or several, in a run directory.

`Run` forks its ranks from a preloaded process (tests/forkserver.py). `DeepSpeedRun`, `HostfileRun` and `TorchRun` start
the real launchers, which start real `python -m pipeline` processes.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE

import pytest
from forkserver import ForkedProcess

from pipeline.train import engine

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SMALL = {  # training it takes less time than starting up
    "model.width": 32,
    "model.depth": 2,
    "model.decoder_width": 32,
    "data.image_size": 32,
    "data.global_batch": 16,
    "engine.micro_batch": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 4,
}


class Run:
    """A run directory and the command that trains in it.

    Args:
        shards: The shard set; None if the settings have data.sources.
    """

    PROGRAM: tuple[str, ...] = ("pipeline", "pretrain", "demo_emae")

    def __init__(self, shards: Path | None, directory: Path):
        self.shards, self.directory = shards, directory

    @property
    def output(self) -> Path:
        """Stdout and stderr of the last start."""
        return self.directory.with_suffix(".output")

    @property
    def pause_dir(self) -> Path:
        return self.directory.with_suffix(".pauses")

    def arguments(self, **settings) -> list[str]:
        """Return what follows `python`. In the name of a setting, a double underscore replaces the dot."""
        settings = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        data = ["--data", str(self.shards)] if self.shards else []
        return ["-m", *self.PROGRAM, *data, "--run", str(self.directory), *sets]

    def start(self, ranks: int = 1, **settings) -> "subprocess.Popen | ForkedProcess":
        return self._start(ranks, self.arguments(**settings), environment())

    def start_paused(self, ranks: int, moment: str, **settings) -> "subprocess.Popen | ForkedProcess":
        """Start, and wait until the run has paused at a moment of paused.py. `unpause` lets it continue."""
        shutil.rmtree(self.pause_dir, ignore_errors=True)
        self.pause_dir.mkdir()
        env = environment(PAUSE_AT=moment, PAUSE_DIR=str(self.pause_dir))
        process = self._start(ranks, ["-m", "paused", *self.arguments(**settings)[1:]], env)
        self.wait_for(process, (self.pause_dir / moment).exists)
        return process

    def unpause(self) -> None:
        (self.pause_dir / "continue").touch()

    def kill_at(self, ranks: int, moment: str, **settings) -> None:
        """Train until a moment of paused.py, and kill all ranks there."""
        self.kill_when(self.start_paused(ranks, moment, **settings), lambda: True)

    def signal_paused(self, process, rank: int, number: signal.Signals) -> None:
        """Send SIGTERM or SIGUSR1 to a rank of a paused run, wait until it is received, and unpause the run."""
        os.kill(self.rank_pids(process)[rank], number)
        self.wait_for(process, lambda: f"{number.name}: saving" in self.output.read_text())
        self.unpause()

    @staticmethod
    def launch(ranks: int, arguments: Sequence[str], **options) -> "subprocess.Popen | ForkedProcess":
        """Start `python ARGUMENTS` on several ranks, in a session of their own."""
        return ForkedProcess(arguments, ranks=rank_environments(ranks) if ranks > 1 else (), **options)

    def train(self, ranks: int = 1, **settings) -> list[dict]:
        """Train to the end and return the metrics."""
        process = self.start(ranks, **settings)
        assert process.wait() == 0, self.output.read_text()[-4000:]
        return self.metrics()

    def metrics(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be incomplete

    def losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self.metrics()]

    def wait_for(self, process, condition: Callable[[], object]) -> None:
        """Wait until a condition holds. Fails if the run ends before that."""
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, self.output.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill_when(self, process, condition: Callable[[], object]) -> None:
        """Kill the launcher and all ranks as soon as a condition holds, and wait for their end."""
        self.wait_for(process, condition)
        pids = self.rank_pids(process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        while any(is_alive(pid) for pid in pids.values()):
            time.sleep(0.005)

    def rank_pids(self, process) -> dict[int, int]:
        """Return the process id of each rank."""
        return dict(enumerate(process.rank_pids or [process.pid]))

    def _start(self, ranks: int, arguments: list[str], env: dict) -> "subprocess.Popen | ForkedProcess":
        with open(self.output, "w") as output:
            return self.launch(ranks, arguments, env=env, stdout=output, stderr=subprocess.STDOUT)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class LaunchedRun(Run):
    """A run under a real launcher."""

    def rank_pids(self, process) -> dict[int, int]:
        pids = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_text().split("\0")
                command = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue  # it has just ended
            env = dict(variable.split("=", 1) for variable in variables if "=" in variable)
            if str(self.directory) in command and "RANK" in env:
                pids[int(env["RANK"])] = int(entry.name)
        return pids


class DeepSpeedRun(LaunchedRun):
    """A run under DeepSpeed's launcher, as on a workstation."""

    @staticmethod
    def launch(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
        launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        return start_program(*launcher, "--module", *arguments[1:], **options)


class HostfileRun(LaunchedRun):
    """A run under DeepSpeed's launcher on the two machines of a hostfile, without ssh.

    Both are this machine. Each has one rank, on the slot that --include names.
    """

    @staticmethod
    def launch(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
        assert ranks == 2
        hosts = ["--hostfile", str(HERE / "hostfile"), "--include", "first:1@second:0", "--no_ssh"]
        master = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        launch = shlex.join([str(BIN / "deepspeed"), *hosts, *master, "--node_rank"])
        run = shlex.join(["--module", *arguments[1:]])
        script = f"{launch} 0 {run} & first=$!; {launch} 1 {run}; code=$?; wait $first || code=$?; exit $code"
        return subprocess.Popen(["bash", "-c", script], start_new_session=True, **options)


class TorchRun(LaunchedRun):
    """A run under torchrun."""

    @staticmethod
    def launch(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
        return start_program(*launcher, *arguments[1:], **options)


def launch_processes(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
    """Start one or two new interpreters instead of forks: `run.launch = launch_processes`."""
    command = [sys.executable, *arguments]
    if ranks == 1:
        return subprocess.Popen(command, start_new_session=True, **options)
    first, second = (" ".join(f"{name}={value}" for name, value in rank.items()) for rank in rank_environments(ranks))
    script = f'{first} "$@" & first=$!; {second} "$@"; code=$?; wait $first && exit $code'
    return subprocess.Popen(["bash", "-c", script, "bash", *command], start_new_session=True, **options)


def start_program(program: str, *arguments: str, **options) -> subprocess.Popen:
    """Start a program of this Python environment in a session of its own."""
    return subprocess.Popen([str(BIN / program), *arguments], start_new_session=True, **options)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return the variables that a launcher sets for each rank."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def environment(**more: str) -> dict[str, str]:
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    return {**os.environ, **fixed, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FaultyRun(Run):
    """A run whose method has the faults of faulty.py."""

    def __init__(self, shards: Path, directory: Path, faults: list[dict]):
        super().__init__(shards, directory)
        self.PROGRAM = ("faulty", json.dumps(faults))


def skip_unless_supported(precision: str) -> None:
    """Skip the test if this processor cannot compute in the precision, as many cannot in fp16."""
    accelerator = engine.get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        pytest.skip("this processor cannot compute in fp16")


def run_module(module: str, *arguments: str, ranks: int = 1) -> str:
    """Run a module of this folder and return its stdout. Fails if it does."""
    process = Run.launch(ranks, ["-m", module, *arguments], env=environment(), stdout=PIPE, stderr=PIPE)
    output, errors = process.communicate()
    assert process.returncode == 0, output[-2000:] + errors[-4000:]
    return output
