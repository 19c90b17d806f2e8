"""Compare a training step of LoMaR with one of MAE at 448 px, ViT-B/16.

    python benchmarks/step_448.py                      CPU, float32
    python benchmarks/step_448.py --batch 128          with a GPU: bfloat16

LoMaR's abstract reports 3.1 x MAE's speed. A step is forward, backward and AdamW on random images, without loader or
network. The two run in turn, so that other load slows down both. A time is the median of the rounds; the ratio is the
median over the rounds, with its 95 % interval (bootstrap).
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
from pipeline.recipe import load_recipe

RECIPES = {"mae": "vitb16_mae_448", "lomar": "vitb16_lomar_448"}
PUBLISHED = 3.1


def make_step(name: str, batch: int, device: str):
    """Return a function that runs one training step and waits for its end."""
    recipe = load_recipe(RECIPES[name])
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
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        keep_freed_memory()
    steps = {name: make_step(name, args.batch, device) for name in RECIPES}
    times: dict[str, list[float]] = {name: [] for name in RECIPES}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first round is a warm-up
                times[name].append(time.perf_counter() - start)
    ratios = np.array(times["mae"]) / np.array(times["lomar"])
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
    gmacs = {name: forward_flops(load_recipe(RECIPES[name]), args.batch) / 2e9 for name in RECIPES}
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratio = {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}
    if args.json:
        print(json.dumps({"arguments": vars(args), "gmacs": gmacs, "seconds": seconds, "ratio": ratio}))
        return
    threads = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"ViT-B/16, 448 px, batch {args.batch}, {threads}; medians of {args.rounds} rounds")
    for name in RECIPES:
        print(f"{name:8}{seconds[name]:8.3f} s/step{gmacs[name]:8.1f} G multiply-adds per image, forward")
    print(
        f"LoMaR is {ratio['median']:.2f} x as fast ({low:.2f} to {high:.2f}; paper: {PUBLISHED}); multiply-adds: "
        f"{gmacs['mae'] / gmacs['lomar']:.2f} x"
    )


if __name__ == "__main__":
    main()
