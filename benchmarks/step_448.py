"""Compare a training step of LoMaR with one of MAE at 448 or 224 px, ViT-B/16.

    python benchmarks/step_448.py                      CPU, float32
    python benchmarks/step_448.py --image-size 224
    python benchmarks/step_448.py --batch 128          with a GPU: bfloat16

LoMaR's abstract reports 3.1 x MAE's speed at 448 px. A step is forward, backward and AdamW on random images, without
loader or network. The two run in turn, so that other load slows down both. A time is the median of the rounds; the
ratio is the median over the rounds, with its 95 % interval (bootstrap).
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from pipeline.distributed.hardware import keep_freed_memory
from pipeline.methods import build_method
from pipeline.methods.flops import forward_flops
from pipeline.recipe import Recipe, load_recipe

RECIPES = {
    224: {"mae": "vitb16_mae", "lomar": "vitb16_lomar"},
    448: {"mae": "vitb16_mae_448", "lomar": "vitb16_lomar_448"},
}
PUBLISHED = {448: 3.1}


def make_step(recipe: Recipe, batch: int, device: str):
    """Return a function that runs one training step and waits for its end."""
    torch.manual_seed(0)
    method = build_method(recipe).to(device)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    size = recipe.data.image_size

    def step() -> None:
        images = torch.randn(batch, 3, size, size, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = method(images, torch.rand(batch, method.noise_size, device=device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, choices=RECIPES, default=448)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        keep_freed_memory()
    recipes = {name: load_recipe(recipe) for name, recipe in RECIPES[args.image_size].items()}
    steps = {name: make_step(recipe, args.batch, device) for name, recipe in recipes.items()}
    times: dict[str, list[float]] = {name: [] for name in recipes}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first round is a warm-up
                times[name].append(time.perf_counter() - start)
    ratios = np.array(times["mae"]) / np.array(times["lomar"])
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
    gmacs = {name: forward_flops(recipe, args.batch) / 2e9 for name, recipe in recipes.items()}
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratio = {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}
    if args.json:
        print(json.dumps({"arguments": vars(args), "gmacs": gmacs, "seconds": seconds, "ratio": ratio}))
        return
    threads = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"ViT-B/16, {args.image_size} px, batch {args.batch}, {threads}; medians of {args.rounds} rounds")
    for name in recipes:
        print(f"{name:8}{seconds[name]:8.3f} s/step{gmacs[name]:8.1f} G multiply-adds per image, forward")
    paper = f"; paper: {PUBLISHED[args.image_size]}" if args.image_size in PUBLISHED else ""
    print(
        f"LoMaR is {ratio['median']:.2f} x as fast ({low:.2f} to {high:.2f}{paper}); multiply-adds: "
        f"{gmacs['mae'] / gmacs['lomar']:.2f} x"
    )


if __name__ == "__main__":
    main()
