"""Measure the overhead of the training loop over the bare DeepSpeed engine.

    python benchmarks/overhead.py                                       ViT-B, float32 on a CPU
    python benchmarks/overhead.py --model vit_large --batch 64 --turn 20    with a GPU: bfloat16

The run is a real `pretrain`: loader, collectives, guard, metrics, a line in metrics.jsonl and TensorBoard at
every step, progress, watchdog. The bare step is forward, backward and step of a second engine of the same
recipe on a batch that is already on the device. Both take turns in one process, so that other load on the
machine slows down both. The result is the median of the ratios of neighboring turns, by the wall clock and by
the CPU time of the process. Checkpoints are not included. The images are small (--image pixels), so that
decoding does not dominate the loader's time.

On a busy machine such ratios vary by more than the overhead. On a CPU the run's time outside the engine's
forward, backward and step is therefore measured as well; it includes the time of the guard, which runs inside
the engine's step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.distributed.launch import init_dist_env
from pipeline.methods import Method, build_method
from pipeline.recipe import Recipe, load_recipe
from pipeline.tasks.pretraining import pretrain
from pipeline.train import engine
from pipeline.train.engine_config import engine_config
from pipeline.train.guard import Guard

WARM_UP = 2
"""Turns that are not counted."""


class MeasurementDone(Exception):
    """All turns are measured."""


class Timestamp(NamedTuple):
    """Seconds on two clocks."""

    wall: float
    cpu: float
    """CPU time of all threads of this process, which depends less on other programs."""

    def __sub__(self, other: "Timestamp") -> "Timestamp":
        return Timestamp(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Timestamp:
    """Wait for the device and return the time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timestamp(time.perf_counter(), time.process_time())


class MeasuredMethod(Method):
    """A recipe's method that runs a turn of a bare engine between two turns of the run that trains it."""

    def __init__(self, recipe: Recipe, rounds: int, turn: int):
        super().__init__()
        self.method, self.recipe, self.rounds, self.turn = build_method(recipe), recipe, rounds, turn
        self.noise_size, self.patch_size = self.method.noise_size, self.method.patch_size
        self.target, self.encoder = self.method.target, self.method.encoder
        self.build_engine = engine.build_engine
        self.step, self.start = 0, Timestamp(0.0, 0.0)
        self.run_times: list[Timestamp] = []
        self.bare_times: list[Timestamp] = []
        self.outside_times: list[Timestamp] = []
        """Time of each of the run's turns that was not spent in the engine."""
        self.engine_time = Timestamp(0.0, 0.0)

    def forward(self, images: torch.Tensor, noise: torch.Tensor):
        return self.method(images, noise)

    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor):
        return self.method.reconstruct(images, noise)

    def set_training_progress(self, done: float) -> None:
        """Start the next turn if it is time. The trainer calls this before every step."""
        if self.step % self.turn == 0:
            if self.step:
                self.run_times.append(now() - self.start)
                self.outside_times.append(self.run_times[-1] - self.engine_time)
            self._run_bare_turn()
            if len(self.bare_times) > WARM_UP + self.rounds:
                raise MeasurementDone
            self.start, self.engine_time = now(), Timestamp(0.0, 0.0)
        self.step += 1

    def instrument(self, model: engine.Engine) -> engine.Engine:
        """Count the time of the engine's calls as engine time, except that of the guard inside them."""
        for name in ("forward", "backward", "step"):
            setattr(model, name, self._timed(getattr(model, name), 1))
        Guard.should_skip = self._timed(Guard.should_skip, -1)
        return model

    def _timed(self, call: Callable, sign: int) -> Callable:
        def timed(*arguments: object) -> object:
            start = now()
            result = call(*arguments)
            spent = now() - start
            wall, cpu = self.engine_time.wall + sign * spent.wall, self.engine_time.cpu + sign * spent.cpu
            self.engine_time = Timestamp(wall, cpu)
            return result

        return timed

    def _run_bare_turn(self) -> None:
        if not self.bare_times:
            self.dist_info = init_dist_env()
            config = engine_config(self.recipe, self.dist_info.world_size)
            method = build_method(self.recipe)
            # In a list, so that its parameters are not registered with this module.
            self.bare = [self.build_engine(self.recipe, method, config, self.dist_info.device)]
            engine.set_learning_rate(self.bare[0], 1e-5)
            size, micro = self.recipe.data.image_size, self.recipe.engine.micro_batch
            self.images = torch.randn(micro, 3, size, size, device=self.dist_info.device)
            self.noise = torch.rand(micro, self.noise_size, device=self.dist_info.device)
        (bare,), start = self.bare, now()
        for _ in range(self.turn * self.recipe.gradient_accumulation_steps(self.dist_info.world_size)):
            bare.backward(bare(self.images, self.noise).loss)
            bare.step()
        self.bare_times.append(now() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20, help="turns of the run and of the bare engine")
    parser.add_argument("--turn", type=int, default=1, help="steps per turn")
    parser.add_argument("--image", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    recipe = load_recipe(
        "vitb16_mae",
        [
            f"model.name={args.model}",
            f"data.global_batch={args.batch}",
            f"engine.micro_batch={args.batch}",
            f"engine.precision={'bf16' if on_gpu else 'fp32'}",
            f"train.steps={10**6}",
            "train.log_every=1",
            f"train.checkpoint_every={10**6}",
            *args.overrides,
        ],
    )
    methods: list[MeasuredMethod] = []
    build_engine = engine.build_engine

    def build(recipe: Recipe) -> MeasuredMethod:
        methods.append(MeasuredMethod(recipe, args.rounds, args.turn))
        if not on_gpu:
            engine.build_engine = lambda *arguments: methods[0].instrument(build_engine(*arguments))
        return methods[0]

    with tempfile.TemporaryDirectory() as folder:
        shards = build_small_set(Path(folder), args.image)
        try:
            pretrain(recipe, [str(shards)], Path(folder) / "run", build)
        except MeasurementDone:
            report(methods[0], args)
        sys.stdout.flush()
        os.chdir("/")
    os._exit(0)  # the run is not finished; skip its clean-up


def build_small_set(folder: Path, size: int) -> Path:
    """Build a shard set of 256 smooth images."""
    images, generator = folder / "images", np.random.default_rng(0)
    images.mkdir()
    for number in range(256):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(images / f"{number:03d}.jpg")
    command = [sys.executable, "-m", "data_prep", "folder", str(images), str(folder / "shards")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "shards"


def report(method: MeasuredMethod, args: argparse.Namespace) -> None:
    bare, run = method.bare_times[WARM_UP:], method.run_times[WARM_UP:]
    rows = {clock: compare(bare, run, clock, args.turn) for clock in Timestamp._fields}
    if args.json:
        print(json.dumps({"arguments": vars(args), **rows}))
        return
    threads = f"{torch.get_num_threads()} CPU threads"
    device = torch.cuda.get_device_name() if method.dist_info.device.type == "cuda" else threads
    print(
        f"{args.model}, batch {args.batch}, {device}, torch {torch.__version__}; {len(run)} turns of "
        f"{args.turn}, every step logged"
    )
    for clock, row in rows.items():
        low, high = row["quartiles"]
        print(
            f"{clock:5}bare engine {row['bare']:.3f} s/step, training run {row['run']:.3f} s/step, overhead "
            f"{row['overhead']:+.2%} (quartiles {low:+.2%} and {high:+.2%})"
        )
        if method.dist_info.device.type == "cpu":
            outside = [getattr(turn_time, clock) for turn_time in method.outside_times[WARM_UP:]]
            share = statistics.median(a / getattr(b, clock) for a, b in zip(outside, run, strict=True))
            milliseconds = 1e3 * statistics.median(outside) / args.turn
            print(f"     outside the engine {milliseconds:.1f} ms/step, {share:.2%}")


def compare(bare: list[Timestamp], run: list[Timestamp], clock: str, turn: int) -> dict:
    """Return medians. A turn of the run is compared with the mean of the bare turns before and after it."""
    bare_seconds = [getattr(turn_time, clock) for turn_time in bare]
    run_seconds = [getattr(turn_time, clock) for turn_time in run]
    ratios = [a / ((b + c) / 2) - 1 for a, (b, c) in zip(run_seconds, pairwise(bare_seconds), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "bare": statistics.median(bare_seconds) / turn,
        "run": statistics.median(run_seconds) / turn,
        "overhead": middle,
        "quartiles": [low, high],
    }


if __name__ == "__main__":
    main()
