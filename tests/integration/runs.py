"""Real runs: processes started as a user starts them, by a launcher where there are several ranks."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
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

    def command(self, ranks: int, settings: dict) -> list[str]:
        sets = [f"--set={key}={value}" for key, value in {**SMALL, **settings}.items()]
        data = ["--data", str(self.shards)] if self.shards else []
        arguments = [*self.PROGRAM[1:], *data, "--run", str(self.directory), *sets]
        return self.launched(ranks, self.PROGRAM[0], arguments)

    @classmethod
    def launched(cls, ranks: int, program: str, arguments: Sequence[str]) -> list[str]:
        alone = [sys.executable, "-m", program, *arguments]
        return alone if ranks == 1 else cls.launch(ranks, alone)

    @staticmethod
    def launch(ranks: int, alone: list[str]) -> list[str]:
        """`alone`, one rank's command, on several ranks: the environment says which, as under srun."""
        return ["bash", str(HERE / "launch_ranks.sh"), str(ranks), str(free_port()), *alone]

    def start(self, ranks: int = 1, **settings) -> subprocess.Popen:
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        with open(self.output, "w") as output:
            return subprocess.Popen(
                self.command(ranks, settings),
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def train(self, ranks: int = 1, **settings) -> list[dict]:
        """Train to the end and return the metrics."""
        process = self.start(ranks, **settings)
        assert process.wait() == 0, self.output.read_text()[-4000:]
        return self.metrics()

    def metrics(self) -> list[dict]:
        path = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self.metrics()]

    def wait_for(self, process: subprocess.Popen, condition) -> None:
        """Wait until the condition holds; it must before the run ends."""
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, self.output.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill_when(self, process: subprocess.Popen, condition) -> None:
        """SIGKILL the launcher and all ranks as soon as the condition holds."""
        self.wait_for(process, condition)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def ranks(self, process: subprocess.Popen) -> dict[int, int]:
        """The process ids of the ranks, by rank."""
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


class DeepSpeedRun(Run):
    """Under DeepSpeed's launcher, as on a workstation."""

    @staticmethod
    def launch(ranks: int, alone: list[str]) -> list[str]:
        python, _, *module = alone
        options = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module"]
        return [str(Path(python).with_name("deepspeed")), *options, *module]


class HostfileRun(Run):
    """Under DeepSpeed's launcher on the two machines of a hostfile, which are both this one: a rank each, on
    the slot that --include names, without ssh."""

    @staticmethod
    def launch(ranks: int, alone: list[str]) -> list[str]:
        assert ranks == 2
        python, _, *module = alone
        hosts = ["--hostfile", str(HERE / "hostfile"), "--include", "first:1@second:0", "--no_ssh"]
        master = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        start = shlex.join([str(Path(python).with_name("deepspeed")), *hosts, *master, "--node_rank"])
        run = shlex.join(["--module", *module])
        script = f"{start} 0 {run} & first=$!; {start} 1 {run}; code=$?; wait $first || code=$?; exit $code"
        return ["bash", "-c", script]


class TorchRun(Run):
    """Under torchrun."""

    @staticmethod
    def launch(ranks: int, alone: list[str]) -> list[str]:
        python, _, *module = alone
        options = ["--standalone", "--nproc-per-node", str(ranks), "-m", "--"]
        return [str(Path(python).with_name("torchrun")), *options, *module]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(HERE), **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FaultyRun(Run):
    """A run whose method fails as `faults` says (see faulty.py)."""

    def __init__(self, shards: Path, directory: Path, faults: list[dict]):
        super().__init__(shards, directory)
        self.PROGRAM = ("faulty", json.dumps(faults))


def printed(module: str, *arguments: str, ranks: int = 1) -> str:
    """What a module of this folder prints, which must end well."""
    once = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # Muon would be compiled for every shape
    command = Run.launched(ranks, module, arguments)
    finished = subprocess.run(command, env=environment(**once), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout
