"""Train every method on CIFAR-10 for the same CPU time and report loss, images/s and FLOPs (small ViT, patch 4).

    CIFAR10_DIR=... OMP_NUM_THREADS=1 python benchmarks/methods_cifar.py                 60 seconds each
    CIFAR10_DIR=... OMP_NUM_THREADS=1 python benchmarks/methods_cifar.py --seconds 300 --json

This shows that each method trains. It does not rank them: the losses are over different patches with
different weights; benchmarks/study.py measures the learned representations. CIFAR10_DIR contains train.tar
with <split>/<class>/<number>.jpg. Images are decoded once into memory. The methods take turns and are timed
by CPU time, so that other load affects all of them equally.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.methods import Method, build_method
from pipeline.methods.flops import forward_flops
from pipeline.recipe import Recipe, load_recipe

SMALL = (
    "data.image_size=32",
    "model.name=vit_tiny",
    "model.patch_size=4",
    "model.width=128",
    "model.depth=4",
    "model.heads=4",
    "model.decoder_width=64",
    "model.decoder_depth=2",
    "model.decoder_heads=4",
    "method.lomar.window_size=4",  # of 8 x 8 patches, as 7 is of 14 x 14
    "method.efficient_mae.beta=6.5",  # 26 px at patch 16, in patches of 4
)
METHODS = {
    "mae": ("vitb16_mae",),
    "emae": ("vitb16_emae",),
    "efficient_mae": ("vitb16_efficient_mae",),
    "lomar": ("vitb16_lomar",),
    "emae + difficulty": ("vitb16_emae", "method.emae.difficulty_flatten=true"),
    "lomar + difficulty": ("vitb16_lomar", "method.lomar.difficulty_flatten=true"),
}
BATCH, WARMUP_STEPS, PEAK_LR = 32, 50, 1e-3
TURN = 5.0  # seconds of CPU time
NUM_HELD_OUT = 256  # images that are not trained on; losses are reported on them


@dataclass
class Run:
    name: str
    recipe: Recipe
    method: Method
    optimizer: torch.optim.Optimizer
    initial_loss: float = 0.0
    """Loss on the held-out images before training."""
    seconds: float = 0.0
    steps: int = 0


def cifar10(directory: Path) -> torch.Tensor:
    """Load the 50,000 training images in a fixed random order, uint8 (N, 3, 32, 32)."""
    with tarfile.open(directory / "train.tar") as archive:
        images = [
            np.asarray(Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB"))
            for member in archive
            if member.name.endswith(".jpg")
        ]
    order = np.random.default_rng(0).permutation(len(images))  # the archive is sorted by class
    return torch.from_numpy(np.stack(images)[order]).permute(0, 3, 1, 2).contiguous()


def make_run(name: str) -> Run:
    preset, *overrides = METHODS[name]
    recipe = load_recipe(preset, [*SMALL, *overrides])
    torch.manual_seed(0)
    method = build_method(recipe)
    groups = [
        {"params": [p for p in method.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in method.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Run(name, recipe, method, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95)))


def normalized(run: Run, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (run.recipe.data.mean, run.recipe.data.std))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def held_out_loss(run: Run, images: torch.Tensor) -> float:
    """Return the loss on the held-out images, with the same noise at every call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), run.method.noise_size, generator=generator)
    return run.method(normalized(run, images), noise).loss.item()


def train_for(run: Run, images: torch.Tensor, seconds: float) -> None:
    """Train for some seconds. Images and noise depend only on the step, so they are the same for every method."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        generator = torch.Generator().manual_seed(1 + run.steps)
        ids = torch.randint(len(images), (BATCH,), generator=generator)
        batch = normalized(run, images[ids])
        if run.steps % 2:
            batch = batch.flip(3)
        noise = torch.rand(BATCH, run.method.noise_size, generator=generator)
        for group in run.optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (run.steps + 1) / WARMUP_STEPS)
        run.method(batch, noise).loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.steps += 1
    run.seconds += time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time per method")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if "CIFAR10_DIR" not in os.environ:
        sys.exit("CIFAR10_DIR is not set; set it to the folder with CIFAR-10 as JPEG files in train.tar")
    images = cifar10(Path(os.environ["CIFAR10_DIR"]))
    held_out, images = images[-NUM_HELD_OUT:], images[:-NUM_HELD_OUT]
    runs = [make_run(name) for name in METHODS]
    for run in runs:
        run.initial_loss = held_out_loss(run, held_out)
    while unfinished := [run for run in runs if run.seconds < args.seconds]:
        for run in unfinished:
            train_for(run, images, min(TURN, args.seconds - run.seconds))
            print(f"{run.name:20}{run.seconds:6.0f} s, {run.steps} steps", file=sys.stderr)
    rows = [
        {
            "method": run.name,
            "mflops": forward_flops(run.recipe) / 1e6,
            "steps": run.steps,
            "images_per_s": run.steps * BATCH / run.seconds,
            "loss_first": run.initial_loss,
            "loss_last": held_out_loss(run, held_out),
        }
        for run in runs
    ]
    if args.json:
        print(json.dumps({"seconds": args.seconds, "threads": torch.get_num_threads(), "rows": rows}))
        return
    print(
        f"{args.seconds:.0f} s of CPU time each, batch {BATCH}, {torch.get_num_threads()} CPU threads, "
        f"torch {torch.__version__}"
    )
    print("| method | MFLOP/image, forward | steps | images/s | loss before | loss after |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['method']} | {row['mflops']:.1f} | {row['steps']} | {row['images_per_s']:.0f} "
            f"| {row['loss_first']:.3f} | {row['loss_last']:.3f} |"
        )


if __name__ == "__main__":
    main()
