"""Pre-train with a method whose loss or gradient is wrong at chosen moments. Started like `-m pipeline`.

    python -m faulty FAULTS --data DIR --run DIR --set KEY=VALUE...

FAULTS is a JSON list of

    {"kind": "loss" | "gradient" | "spike", "steps": [...]}            at these steps, counted as in metrics.jsonl
    {"kind": "loss" | "gradient" | "spike", "data_of_steps": [...]}    for every sample that these steps would read
    {"kind": "slow", "rank": R, "seconds": S}                          each forward pass of a rank takes longer
    {"kind": "signal", "steps": [...]}                                 SIGTERM during the forward passes of these steps
    {"kind": "out of memory", "rank": R, "steps": [...]}               as if the rank's GPU were too small, at the last
                                                                       micro batch of these steps
    {"kind": "nondeterministic"}                                       use an operator that has no deterministic form
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.commands.exit_codes import run_command
from pipeline.data.philox import Purpose, uniform
from pipeline.data.reader import ShardReader
from pipeline.data.sampler import rank_positions
from pipeline.distributed.logging import setup_logging
from pipeline.methods import Method, MethodOutput, build_method
from pipeline.recipe import load_recipe
from pipeline.tasks.pretraining import pretrain

FACTOR = {"loss": float("nan"), "gradient": float("nan"), "spike": 100.0}


class ScaleGradient(torch.autograd.Function):
    """Returns the loss unchanged, and multiplies its gradient by `factor`."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.save_for_backward(factor)
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


class FaultyMethod(Method):
    """A recipe's method, with faults."""

    def __init__(self, method, faults, total_steps):
        super().__init__()
        self.method, self.faults, self.total_steps, self.step, self.forwards = method, faults, total_steps, 0, 0
        self.noise_size, self.grid, self.patch_size = method.noise_size, method.grid, method.patch_size
        self.target = method.target
        self.encoder = method.encoder

    def set_training_progress(self, progress):
        self.step = round(progress * self.total_steps) + 1
        self.method.set_training_progress(progress)

    def reconstruct(self, images, noise):
        return self.method.reconstruct(images, noise)

    def forward(self, images, noise) -> MethodOutput:
        output = self.method(images, noise)
        loss = output.loss
        for fault in self.faults:
            if fault["kind"] == "slow":
                time.sleep(fault["seconds"] * (fault["rank"] == int(os.environ["RANK"])))
                continue
            if fault["kind"] == "signal":
                if self.step in fault["steps"]:
                    os.kill(os.getpid(), signal.SIGTERM)
                continue
            if fault["kind"] == "out of memory":
                self.forwards += self.step in fault["steps"]
                if fault["rank"] == int(os.environ["RANK"]) and self.forwards == 2:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                continue
            if fault["kind"] == "nondeterministic":
                torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
                continue
            is_faulty = torch.tensor(self.step in fault.get("steps", []))
            if "noise" in fault:
                is_faulty = is_faulty | (noise[:, 0, None] == fault["noise"]).any()
            factor = torch.where(is_faulty, FACTOR[fault["kind"]], 1.0)
            loss = ScaleGradient.apply(loss, factor) if fault["kind"] == "gradient" else loss * factor
        return output._replace(loss=loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", type=json.loads)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    setup_logging()
    recipe = load_recipe("demo_emae", args.overrides)

    def build(recipe):
        method = build_method(recipe)
        sampler = ShardReader(recipe.resolve_sources([args.data]), recipe.data).sampler(recipe.seed)
        for fault in args.faults:
            for step in fault.get("data_of_steps", []):
                # A sample is recognized by the first number of its mask noise.
                locations = sampler.locate(rank_positions(step - 1, recipe.data.global_batch, 0, 1))
                noise = uniform(recipe.seed, Purpose.MASK, locations.epoch, locations.sample_id, method.noise_size)
                known = fault.setdefault("noise", torch.empty(0))
                fault["noise"] = torch.cat([known, torch.from_numpy(np.ascontiguousarray(noise[:, 0]))])
        return FaultyMethod(method, args.faults, recipe.train.steps)

    sys.exit(run_command(lambda: pretrain(recipe, [args.data], args.run, build)))


if __name__ == "__main__":
    main()
