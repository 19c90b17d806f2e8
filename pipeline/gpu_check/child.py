"""Run a function in processes of its own, on one rank or several.

Invariant: whatever the function does to its process (an exception, a signal, a hang, a crash at exit), the caller gets
its JSON result or a `ChildError`, and no process that it started is left.

`python -m pipeline.gpu_check.child FUNCTION ARGUMENTS RESULT` is the process: FUNCTION is "module:function", ARGUMENTS
a JSON object of keyword arguments. Several ranks are started by torchrun, as training is.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

TOKEN = "SHARDMAE_GPU_CHECK"
"""Environment variable by which the processes of a call are found, also those in sessions of their own."""
POLL_S = 0.1
KILL_WAIT_S = 10.0
"""A process that waits for a device can end late."""
OUTPUT_LINES = 60
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ChildError(RuntimeError):
    """A process that delivered no result, or crashed after it."""

    def __init__(self, reason: str, output: str):
        super().__init__(reason)
        self.output = output
        """The last lines that it printed."""


def call(
    function: str,
    arguments: Mapping[str, Any],
    *,
    device: str,
    timeout_s: float,
    ranks: int = 1,
    on_poll: Callable[[], None] = lambda: None,
) -> Any:
    """Call a function in new processes and return its result, with several ranks that of rank 0.

    Args:
        function: "module:function"; takes and returns JSON values.
        device: "cuda" or "cpu".
        timeout_s: Seconds after which the processes are killed.
        ranks: Number of processes. The function calls `init_dist_env` itself.
        on_poll: Called several times per second while waiting.

    Raises:
        ChildError: If a process fails, crashes or takes too long.
    """
    module = ["-m", "pipeline.gpu_check.child", function, json.dumps(dict(arguments))]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, *launcher, *module, str(result)]
        reason = run(command, Path(folder, "output"), device=device, timeout_s=timeout_s, on_poll=on_poll)
        answer = json.loads(result.read_text()) if result.exists() else {}
        output = Path(folder, "output").read_text(errors="replace")
    if reason or "value" not in answer:
        raise ChildError(answer.get("error") or reason or "delivered no result", _last_lines(output))
    return answer["value"]


def run(
    command: list[str],
    output: Path,
    *,
    device: str,
    timeout_s: float,
    on_poll: Callable[[], None] = lambda: None,
    stop_when: Callable[[], bool] = lambda: False,
) -> str:
    """Run a command and kill everything that it started.

    Args:
        output: File for stdout and stderr.
        stop_when: Polled; if it returns True, the command and its descendants are killed with SIGKILL.

    Returns:
        Why it failed; empty if it exited with 0 or was stopped by `stop_when`.
    """
    token = f"{os.environ.get(TOKEN, '')}/{uuid.uuid4().hex}"
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {TOKEN: token, "DS_ACCELERATOR": device, "PYTHONFAULTHANDLER": "1"}
    deadline = time.monotonic() + timeout_s
    with open(output, "wb") as file:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL_S)
                    return _describe_exit(code, output.read_text(errors="replace"))
                on_poll()
                if stop_when():
                    return ""
                if time.monotonic() > deadline:
                    return f"no result after {timeout_s:.0f} s"
        finally:
            _kill_all(token)
            process.wait()


def _describe_exit(code: int, output: str) -> str:
    if code == 0:
        return ""
    ranks_signal = re.search(r"Signal \d+ \((SIG\w+)\) received", output)  # of a rank, reported by torchrun
    if code < 0 or ranks_signal:
        return f"ended by {signal.Signals(-code).name if code < 0 else ranks_signal and ranks_signal[1]}"
    lines = _last_lines(output).splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"


def _kill_all(token: str) -> None:
    """Kill the processes with this token, and those that they started, and wait until they have ended."""
    killed = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(TOKEN, "").startswith(token):
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=KILL_WAIT_S)


def _last_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-OUTPUT_LINES:])


def main() -> None:
    """Call the function; write {"value": result}, or {"error": text} and exit with a traceback."""
    from pipeline.gpu_check.check import resolve

    function, arguments, result = sys.argv[1:4]
    path = Path(result)
    try:
        value = resolve(function)(**json.loads(arguments))
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        with suppress(FileExistsError), open(path, "x") as file:  # several ranks may fail
            json.dump({"error": f"{type(error).__name__}: {first_line}"}, file)
        if isinstance(error, ChildError):
            print(error.output, file=sys.stderr)
        raise
    if os.environ.get("RANK", "0") == "0":
        path.write_text(json.dumps({"value": value}))


if __name__ == "__main__":
    main()
