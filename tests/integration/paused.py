"""Run a program of `pipeline` that waits at a chosen moment until a file appears. Started like `-m pipeline`.

    PAUSE_AT=MOMENT PAUSE_FOLDER=FOLDER python -m paused MODULE ARGUMENTS...

MOMENT is "step N": before that step; or "checkpoint N": while the checkpoint of that step is written, when
every rank has written its part. There rank 0 creates FOLDER/MOMENT and waits for FOLDER/go, and the others
wait for rank 0.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from pipeline.train import engine, trainer

learning_rate, complete = trainer.learning_rate, engine.consolidate_fp32_weights


def reach(moment: str) -> None:
    folder = Path(os.environ["PAUSE_FOLDER"])
    if os.environ.get("RANK", "0") == "0" and moment == os.environ["PAUSE_AT"]:
        (folder / moment).touch()
        while not (folder / "go").exists():
            time.sleep(0.005)


def pausing_learning_rate(step, *arguments):
    reach(f"step {step + 1}")
    return learning_rate(step, *arguments)


def pausing_complete(model, average, path):
    reach(f"checkpoint {int(path.name.split('.')[0].removeprefix('step-'))}")
    complete(model, average, path)


if __name__ == "__main__":
    trainer.learning_rate, engine.consolidate_fp32_weights = pausing_learning_rate, pausing_complete
    module, *sys.argv[1:] = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
