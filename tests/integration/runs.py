"""Real runs: the processes of one rank or several, in a run directory.

`Run` forks its ranks from a preloaded process (tests/forkserver.py). `DeepSpeedRun`, `HostfileRun` and
`TorchRun` start the real launchers, and with them real `python -m pipeline` processes.
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
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

import pytest
from forkserver import ForkedProcess

from pipeline.train import engine

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
SMALL = {  # a model small enough that starting up takes longer than training
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
    """One run directory and the command that trains there."""

    PROGRAM = ("pipeline", "pretrain", "demo_emae")

    def __init__(self, shards: Path | None, directory: Path):
        """shards: None where the settings name data.sources."""
        self.shards, self.directory = shards, directory

    @property
    def output(self) -> Path:
        return self.directory.with_suffix(".output")

    @property
    def pauses(self) -> Path:
        return self.directory.with_suffix(".pauses")

    def arguments(self, **settings) -> list[str]:
        """What follows `python`. A double underscore in a setting's name stands for a dot."""
        settings = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
        sets = [f"--set={key}={value}" for key, value in settings.items()]
        data = ["--data", str(self.shards)] if self.shards else []
        return ["-m", *self.PROGRAM, *data, "--run", str(self.directory), *sets]

    def start(self, ranks: int = 1, **settings) -> "subprocess.Popen | ForkedProcess":
        with open(self.output, "w") as output:
            return self.launch(
                ranks, self.arguments(**settings), env=environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def start_paused(self, ranks: int, moment: str, **settings) -> "subprocess.Popen | ForkedProcess":
        """Start, and wait until the run waits at a moment (see paused.py). `go` lets it continue."""
        shutil.rmtree(self.pauses, ignore_errors=True)
        self.pauses.mkdir()
        pause = {"PAUSE_AT": moment, "PAUSE_FOLDER": str(self.pauses)}
        arguments = ["-m", "paused", *self.arguments(**settings)[1:]]
        with open(self.output, "w") as output:
            process = self.launch(
                ranks, arguments, env=environment(**pause), stdout=output, stderr=subprocess.STDOUT
            )
        self.wait_for(process, (self.pauses / moment).exists)
        return process

    def go(self) -> None:
        (self.pauses / "go").touch()

    def kill_at(self, ranks: int, moment: str, **settings) -> None:
        """Train until a moment and SIGKILL all ranks there."""
        self.kill_when(self.start_paused(ranks, moment, **settings), lambda: True)

    def signal(self, process, rank: int, number: signal.Signals) -> None:
        """Send a rank of a paused run SIGTERM or SIGUSR1, wait until it knows and let the run continue."""
        os.kill(self.ranks(process)[rank], number)
        self.wait_for(process, lambda: f"{number.name}: saving and stopping" in self.output.read_text())
        self.go()

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
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be being written

    def losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self.metrics()]

    def wait_for(self, process, condition) -> None:
        """Wait until the condition holds; it must before the run ends."""
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, self.output.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill_when(self, process, condition) -> None:
        """SIGKILL the launcher and all ranks as soon as the condition holds, and wait until they are gone."""
        self.wait_for(process, condition)
        ranks = self.ranks(process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        while any(is_alive(pid) for pid in ranks.values()):
            time.sleep(0.005)

    def ranks(self, process) -> dict[int, int]:
        """The process ids of the ranks, by rank."""
        return dict(enumerate(process.rank_pids or [process.pid]))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class LaunchedRun(Run):
    """A run under a real launcher."""

    def ranks(self, process) -> dict[int, int]:
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(entry.name)) != process.pid:
                    continue
                words = (entry / "environ").read_text().split("\0")
                command = (entry / "cmdline").read_text().split("\0")
            except (OSError, ProcessLookupError):
                continue  # it has just ended
            environment = dict(word.split("=", 1) for word in words if "=" in word)
            if "pretrain" in command and "RANK" in environment:
                found[int(environment["RANK"])] = int(entry.name)
        return found


class DeepSpeedRun(LaunchedRun):
    """Under DeepSpeed's launcher, as on a workstation."""

    @staticmethod
    def launch(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
        launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        return start(*launcher, "--module", *arguments[1:], **options)


class HostfileRun(LaunchedRun):
    """Under DeepSpeed's launcher on the two machines of a hostfile, which are both this one: a rank each, on
    the slot that --include names, without ssh."""

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
    """Under torchrun."""

    @staticmethod
    def launch(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
        return start(*launcher, *arguments[1:], **options)


def launch_processes(ranks: int, arguments: Sequence[str], **options) -> subprocess.Popen:
    """Start new interpreters instead of forks: `run.launch = launch_processes`. One rank or two."""
    command = [sys.executable, *arguments]
    if ranks == 1:
        return subprocess.Popen(command, start_new_session=True, **options)
    first, second = (
        " ".join(f"{name}={value}" for name, value in rank.items()) for rank in rank_environments(ranks)
    )
    script = f'{first} "$@" & first=$!; {second} "$@"; code=$?; wait $first && exit $code'
    return subprocess.Popen(["bash", "-c", script, "bash", *command], start_new_session=True, **options)


def start(program: str, *arguments: str, **options) -> subprocess.Popen:
    """Start a program of this Python environment in a session of its own."""
    return subprocess.Popen([str(BIN / program), *arguments], start_new_session=True, **options)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher adds to the environment of each rank."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def environment(**more: str) -> dict[str, str]:
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
    return {**os.environ, **fixed, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FaultyRun(Run):
    """A run whose method fails as `faults` says (see faulty.py)."""

    def __init__(self, shards: Path, directory: Path, faults: list[dict]):
        super().__init__(shards, directory)
        self.PROGRAM = ("faulty", json.dumps(faults))


def needs_precision(precision: str) -> None:
    """Skip if this processor cannot compute in the precision, as many cannot in fp16."""
    accelerator = engine.get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        pytest.skip("this processor cannot compute in fp16")


def printed(module: str, *arguments: str, ranks: int = 1) -> str:
    """What a module of this folder prints, which must end well."""
    process = Run.launch(ranks, ["-m", module, *arguments], env=environment(), stdout=PIPE, stderr=PIPE)
    output, errors = process.communicate()
    assert process.returncode == 0, output[-2000:] + errors[-4000:]
    return output
