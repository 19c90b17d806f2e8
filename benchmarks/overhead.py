"""What the training loop costs over the bare DeepSpeed engine: a step of a real run beside a bare one.

    python benchmarks/overhead.py                                       ViT-B, float32 on a CPU
    python benchmarks/overhead.py --model vit_large --batch 64 --turn 20    with a GPU: bfloat16

The run is `pretrain` itself: loader, agreement between ranks, guard, metrics, a line in metrics.jsonl and
TensorBoard at every step, progress, watchdog. The bare step is forward, backward and step of a second engine
of the same recipe on a batch that is already there. They take turns in one process, so that a machine that
slows down slows both; what counts is the median of the ratios of neighbouring turns, by the wall clock and by
the process's CPU time. Checkpoints are not part of it. The images are small (--image pixels): what the loader
costs is then not their decoding.

On a machine that is not quiet such ratios scatter by more than the loop costs. So on a CPU the run's time
outside the engine's forward, backward and step is measured as well, and with it that of the guard inside the
last.
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
"""Turns that don't count."""


class Enough(Exception):
    """All turns are measured."""


class Moment(NamedTuple):
    """Seconds on two clocks."""

    wall: float
    cpu: float
    """Of all threads of this process: other programs disturb it less."""

    def __sub__(self, other: "Moment") -> "Moment":
        return Moment(self.wall - other.wall, self.cpu - other.cpu)


def now() -> Moment:
    """When everything asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Moment(time.perf_counter(), time.process_time())


class Rival(Method):
    """A recipe's method. Between two turns of the run that trains it, it gives a bare engine its turn."""

    def __init__(self, recipe: Recipe, rounds: int, turn: int):
        super().__init__()
        self.method, self.recipe, self.rounds, self.turn = build_method(recipe), recipe, rounds, turn
        self.noise_size, self.patch_size = self.method.noise_size, self.method.patch_size
        self.normalize_targets, self.encoder = self.method.normalize_targets, self.method.encoder
        self.build_engine = engine.build_engine
        self.step, self.began = 0, Moment(0.0, 0.0)
        self.loop_times: list[Moment] = []
        self.bare_times: list[Moment] = []
        self.outside: list[Moment] = []
        """Of each of the loop's turns, what was not the engine's."""
        self.inside = Moment(0.0, 0.0)

    def forward(self, images: torch.Tensor, noise: torch.Tensor):
        return self.method(images, noise)

    def reconstruct(self, images: torch.Tensor, noise: torch.Tensor):
        return self.method.reconstruct(images, noise)

    def set_training_progress(self, done: float) -> None:
        """The loop calls it before every step."""
        if self.step % self.turn == 0:
            if self.step:
                self.loop_times.append(now() - self.began)
                self.outside.append(self.loop_times[-1] - self.inside)
            self._bare_turn()
            if len(self.bare_times) > WARM_UP + self.rounds:
                raise Enough
            self.began, self.inside = now(), Moment(0.0, 0.0)
        self.step += 1

    def watch(self, model: engine.Engine) -> engine.Engine:
        """Count the time in the engine's calls as inside, that of the guard's verdict in them as outside."""
        for name in ("forward", "backward", "step"):
            setattr(model, name, self._counted(getattr(model, name), 1))
        Guard.should_skip = self._counted(Guard.should_skip, -1)
        return model

    def _counted(self, call: Callable, sign: int) -> Callable:
        def counted(*arguments: object) -> object:
            began = now()
            result = call(*arguments)
            spent = now() - began
            self.inside = Moment(self.inside.wall + sign * spent.wall, self.inside.cpu + sign * spent.cpu)
            return result

        return counted

    def _bare_turn(self) -> None:
        if not self.bare_times:
            self.world = init_dist_env()
            config = engine_config(self.recipe, self.world.size)
            method = build_method(self.recipe)
            self.bare = [self.build_engine(self.recipe, method, config, self.world.device)]
            engine.set_learning_rate(self.bare[0], 1e-5)
            size, micro = self.recipe.data.image_size, self.recipe.engine.micro_batch
            self.images = torch.randn(micro, 3, size, size, device=self.world.device)
            self.noise = torch.rand(micro, self.noise_size, device=self.world.device)
        (bare,), began = self.bare, now()
        for _ in range(self.turn * self.recipe.accumulation(self.world.size)):
            bare.backward(bare(self.images, self.noise).loss)
            bare.step()
        self.bare_times.append(now() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each")
    parser.add_argument("--turn", type=int, default=1, help="steps a turn")
    parser.add_argument("--image", type=int, default=64, help="pixels of the images' sides")
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
    rivals: list[Rival] = []
    build_engine = engine.build_engine

    def build(recipe: Recipe) -> Rival:
        rivals.append(Rival(recipe, args.rounds, args.turn))
        if not on_gpu:
            engine.build_engine = lambda *of_the_run: rivals[0].watch(build_engine(*of_the_run))
        return rivals[0]

    with tempfile.TemporaryDirectory() as folder:
        shards = small_set(Path(folder), args.image)
        try:
            pretrain(recipe, [str(shards)], Path(folder) / "run", build)
        except Enough:
            report(rivals[0], args)
        sys.stdout.flush()
        os.chdir("/")
    os._exit(0)  # the run was left in the middle


def small_set(folder: Path, size: int) -> Path:
    """A shard set of 256 smooth images."""
    images, generator = folder / "images", np.random.default_rng(0)
    images.mkdir()
    for number in range(256):
        rough = Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8))
        rough.resize((size, size), Image.Resampling.BICUBIC).save(images / f"{number:03d}.jpg")
    command = [sys.executable, "-m", "data_prep", "folder", str(images), str(folder / "shards")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "shards"


def report(rival: Rival, args: argparse.Namespace) -> None:
    bare, loop = rival.bare_times[WARM_UP:], rival.loop_times[WARM_UP:]
    rows = {clock: compared(bare, loop, clock, args.turn) for clock in Moment._fields}
    if args.json:
        print(json.dumps({"arguments": vars(args), **rows}))
        return
    threads = f"{torch.get_num_threads()} CPU threads"
    where = torch.cuda.get_device_name() if rival.world.device.type == "cuda" else threads
    print(
        f"{args.model}, batch {args.batch}, {where}, torch {torch.__version__}; {len(loop)} turns of "
        f"{args.turn}, every step logged"
    )
    for clock, row in rows.items():
        low, high = row["quartiles"]
        print(
            f"{clock:5}bare engine {row['bare']:.3f} s/step, training run {row['loop']:.3f} s/step, overhead "
            f"{row['overhead']:+.2%} (quartiles {low:+.2%} and {high:+.2%})"
        )
        if rival.world.device.type == "cpu":
            spent = [getattr(moment, clock) for moment in rival.outside[WARM_UP:]]
            share = statistics.median(a / getattr(b, clock) for a, b in zip(spent, loop, strict=True))
            milliseconds = 1e3 * statistics.median(spent) / args.turn
            print(f"     outside the engine {milliseconds:.1f} ms/step, {share:.2%}")


def compared(bare: list[Moment], loop: list[Moment], clock: str, turn: int) -> dict:
    """Medians. A turn of the loop stands between two bare ones: it is held against their mean."""
    alone = [getattr(moment, clock) for moment in bare]
    whole = [getattr(moment, clock) for moment in loop]
    ratios = [a / ((b + c) / 2) - 1 for a, (b, c) in zip(whole, pairwise(alone), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "bare": statistics.median(alone) / turn,
        "loop": statistics.median(whole) / turn,
        "overhead": middle,
        "quartiles": [low, high],
    }


if __name__ == "__main__":
    main()
