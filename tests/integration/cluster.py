"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, in one directory.

It is independent of a Slurm of the machine. Needs the packages slurm-wlm and munge, and root (or root in a user
namespace).
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost({addresses[0]})
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
FirstJobId={first_job}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdTimeout={slurmd_timeout}
MessageTimeout=20
KillWait=20
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr={addresses[1]} Port={ports[1]} CPUs=96 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr={addresses[2]} Port={ports[2]} CPUs=96 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


class Network:
    """Two hosts, n1 and n2, each a network namespace with an address and a cable to a bridge. Needs root."""

    def __init__(self):
        subnet = f"10.211.{os.getpid() % 256}"
        self.addresses = [f"{subnet}.254", f"{subnet}.1", f"{subnet}.2"]
        self.bridge = f"sm{os.getpid()}"
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.addresses[0]}/24", "dev", self.bridge)
        self._ip("link", "set", self.bridge, "up")
        for host, address in zip(("n1", "n2"), self.addresses[1:], strict=True):
            namespace, cable = f"{self.bridge}-{host}", f"{self.bridge}{host}"
            self._ip("netns", "add", namespace)
            self._ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            self._ip("link", "set", cable, "master", self.bridge, "up")
            self._ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", namespace, "link", "set", "eth0", "up")
            self._ip("-n", namespace, "link", "set", "lo", "up")

    def command(self, host: str) -> list[str]:
        """Return the prefix of a command that runs on a host."""
        return ["nsenter", f"--net=/run/netns/{self.bridge}-{host}"]

    def set_link(self, host: str, *, connected: bool) -> None:
        self._ip("link", "set", f"{self.bridge}{host}", "up" if connected else "down")

    def close(self) -> None:
        for host in ("n1", "n2"):
            self._ip("netns", "del", f"{self.bridge}-{host}")
        self._ip("link", "del", self.bridge)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


class Cluster:
    """Two nodes, n1 and n2, each configured with 96 cores and 8 GPUs that do not exist.

    Args:
        network: The hosts of the nodes; None to run all on the loopback device.
        slurmd_timeout: Seconds after which Slurm considers a node that does not respond as down.
    """

    def __init__(self, directory: Path, network: Network | None = None, slurmd_timeout: int = 8):
        self.directory, self.network = directory, network
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}
        self._requeued_at: dict[tuple[str, str], float] = {}
        (directory / "state").mkdir(parents=True)
        key = directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = _free_ports(3)
        addresses = network.addresses if network else 3 * ["127.0.0.1"]
        configuration = CONFIGURATION.format(
            directory=directory,
            ports=ports,
            addresses=addresses,
            slurmd_timeout=slurmd_timeout,
            first_job=1 + os.getpid() % 10000,  # the rendezvous port of a job depends on its id
        )
        (directory / "slurm.conf").write_text(configuration)
        for number in range(8):
            (directory / f"gpu{number}").touch()
        (directory / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={directory}/gpu[0-7]\n")
        try:
            self._start(key)
        except BaseException:
            self.close()
            raise

    def _start(self, key: Path) -> None:
        directory = self.directory
        files = {"key-file": key, "pid-file": directory / "munged.pid", "log-file": directory / "munged.log"}
        files |= {"socket": directory / "munge.sock", "seed-file": directory / "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in files.items()))
        _until((directory / "munge.sock").exists, 20, self.logs)
        self._daemon("slurmctld", "-D")
        self.start_node("n1")
        self.start_node("n2")
        _until(lambda: self.states() == {"n1": "idle", "n2": "idle"}, 60, self.logs)

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name, label=name, host=name)

    def kill_node(self, name: str) -> None:
        """Kill the node's slurmd and all its processes, as a loss of power would."""
        self.daemons.pop(name).kill()
        for process in self.processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)

    def processes(self, name: str, word: str = "") -> list[Path]:
        """Return the /proc directories of the processes of a node's jobs, with `word` in the command line."""
        marks = {f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.directory}/slurm.conf".encode()}
        processes = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((process / "environ").read_bytes().split(b"\0"))
                command = (process / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if marks <= environment and word.encode() in command:
                processes.append(process)
        return processes

    def states(self) -> dict[str, str]:
        """Return sinfo's state of each node."""
        listed = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False)
        return dict(line.split() for line in listed.splitlines())

    def run(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        """Run a Slurm command and return its stdout."""
        finished = subprocess.run(
            [str(word) for word in command],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or finished.returncode == 0, (command, finished.stdout, finished.stderr)
        return finished.stdout

    def submit(self, *arguments: str | Path, **environment: str) -> str:
        """Submit a job with sbatch. Returns its id."""
        return self.run("sbatch", "--parsable", *arguments, **environment).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return scontrol's fields of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, seconds: float, output: Path | None = None) -> dict[str, str]:
        """Wait for a job's end. Slurm delays a requeued job by two minutes; here it starts at once."""
        deadline = time.monotonic() + seconds
        while not self.has_ended(job):
            fields = self.job(job)
            assert time.monotonic() < deadline, (fields, output and output.read_text()[-4000:], self.logs())
            self.start_if_requeued(fields)
            time.sleep(0.3)
        return self.job(job)

    def has_ended(self, job: str) -> bool:
        """Return whether a job has ended and is not being requeued, during which it is FAILED for a moment."""
        for _ in range(8):
            if self.job(job)["JobState"] not in ENDED:
                return False
            time.sleep(0.3)
        return True

    def wait_for_all(self, seconds: float) -> None:
        """Wait until no job is left."""
        deadline = time.monotonic() + seconds
        while listed := self.run("squeue", "-h").strip():
            assert time.monotonic() < deadline, (listed, self.logs())
            time.sleep(0.3)

    def start_if_requeued(self, fields: dict[str, str]) -> None:
        """Start a requeued job, a few seconds after it was requeued: before that its nodes may reject it.

        Slurm holds a job whose node did not answer the launch in time, which happens on a busy machine.
        """
        if fields["Reason"] == "launch_failed_requeued_held":
            self.run("scontrol", "release", fields["JobId"], check=False)
        if fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime":
            key = fields["JobId"], fields["Restarts"]
            if time.monotonic() - self._requeued_at.setdefault(key, time.monotonic()) > 4:
                self.run("scontrol", "update", f"JobId={fields['JobId']}", "StartTime=now", check=False)

    def close(self) -> None:
        self.run("scancel", "--user", "root", check=False)
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.3)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(20)

    def _daemon(self, program: str, *arguments: str, label: str = "", host: str = "") -> None:
        path = shutil.which(program) or f"/usr/sbin/{program}"
        on_host = self.network.command(host) if self.network and host else []
        with_tests = ["setpriv", "--pdeathsig", "TERM"]  # it ends if the test process is killed
        name = label or program
        with open(self.directory / f"{name}.out", "a") as output:
            self.daemons[name] = subprocess.Popen(
                [*on_host, *with_tests, path, *arguments], env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        logs = sorted([*self.directory.glob("*.log"), *self.directory.glob("*.out")])
        return "\n".join(f"== {log.name}\n{log.read_text()[-1500:]}" for log in logs)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _until(condition, seconds: float, explain) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)
