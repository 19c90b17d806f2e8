"""Measure the cost of Efficient MAE's difficulty: P2Dist of a batch's masks relative to a training step.

    python benchmarks/difficulty.py                             ViT-L, 256 masks, a step of 8 images, float32
    python benchmarks/difficulty.py --images 64 --device cuda   the step in bfloat16 (autocast)

P2Dist and the step run in turn. A step is forward, backward and AdamW; its time is scaled to as many images
as there are masks.
"""

import argparse
import statistics
import time

import torch

from pipeline.difficulty import patch_distance
from pipeline.masking import as_mask, random_split
from pipeline.methods import build_method
from pipeline.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="vitl16_efficient_mae")
    parser.add_argument("--masks", type=int, default=256)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    torch.manual_seed(0)
    method = build_method(recipe).to(args.device)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-5, fused=True)
    size, patch = recipe.data.image_size, recipe.model.patch_size
    images = torch.randn(args.images, 3, size, size, device=args.device)
    noise = torch.rand(args.images, method.noise_size, device=args.device)
    visible_ids, _ = random_split(torch.rand(args.masks, recipe.num_patches), recipe.num_visible)
    visible = as_mask(visible_ids, recipe.num_patches).view(-1, recipe.grid, recipe.grid).to(args.device)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = method(images, noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    tasks = {
        "Algorithm 1": lambda: patch_distance(visible, patch),
        "Eq. 1": lambda: patch_distance(visible, patch, exact=True),
        "step": step,
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(args.rounds + 1):
        for name, run in tasks.items():
            start = time.perf_counter()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first round is a warm-up
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    step_time = seconds.pop("step") * args.masks / args.images
    print(f"a step of {args.masks} images: {step_time:.1f} s; medians of {args.rounds} rounds")
    for name, mask_time in seconds.items():
        print(f"P2Dist by {name}, {args.masks} masks: {mask_time:.3f} s, {mask_time / step_time:.2%} of a step")


if __name__ == "__main__":
    main()
