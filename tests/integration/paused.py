"""Run a module of `pipeline`, and pause at a chosen moment until a file appears. Started like `-m pipeline`.

    PAUSE_AT=MOMENT PAUSE_DIR=DIRECTORY python -m paused MODULE ARGUMENTS...

MOMENT is "step N": before that step; or "checkpoint N": while the checkpoint of that step is written, after every rank
has written its part. Rank 0 creates DIRECTORY/MOMENT and waits for DIRECTORY/continue; the other ranks wait for rank 0.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from pipeline.train import engine, trainer

learning_rate, consolidate_fp32_weights = trainer.learning_rate, engine.consolidate_fp32_weights


def pause_at(moment: str) -> None:
    directory = Path(os.environ["PAUSE_DIR"])
    if os.environ.get("RANK", "0") == "0" and moment == os.environ["PAUSE_AT"]:
        (directory / moment).touch()
        while not (directory / "continue").exists():
            time.sleep(0.005)


def pausing_learning_rate(step, *arguments):
    pause_at(f"step {step + 1}")
    return learning_rate(step, *arguments)


def pausing_consolidation(model, model_ema, directory):
    pause_at(f"checkpoint {int(directory.name.split('.')[0].removeprefix('step-'))}")
    consolidate_fp32_weights(model, model_ema, directory)


if __name__ == "__main__":
    trainer.learning_rate, engine.consolidate_fp32_weights = pausing_learning_rate, pausing_consolidation
    module, *sys.argv[1:] = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
