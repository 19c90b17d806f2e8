"""Compare a training step of our methods with transformers' ViTMAE and lightly's MAE on one machine.

    python benchmarks/step.py                                     MAE, ViT-B, CPU, float32
    python benchmarks/step.py --only mae emae efficient_mae lomar     our methods only
    python benchmarks/step.py --model vit_large --batch 128       with a GPU: bfloat16
    python benchmarks/step.py --model vit_huge --patch 14 --batch 64 --compile --only mae efficient_mae
    python benchmarks/step.py --only mae "mae, engine" --zero-stage 2     with and without DeepSpeed

A step is forward, backward and AdamW on random images, without loader or network. The contestants take turns,
each in a separate process, so that other load slows down all of them and none reuses memory that another has
freed. A time is the median of the turns; a ratio is the median over the rounds, with its 95 % interval
(bootstrap).

"mae, engine" and the like are the steps that training runs: DeepSpeed's engine with gradient accumulation in fp32,
norm, guard and optimizer, on one GPU. "encoder" and "timm encoder" are forward passes over all patches. MFU refers to
the card's own peak, unless --gpu names another.

On a CPU our methods keep freed memory as our training runs do (keep_freed_memory in
pipeline/distributed/hardware.py); the peers run unchanged, and with "memory kept" in the name also with that
setting. On a GPU our methods have bfloat16 weights with float32 masters, as in DeepSpeed; the peers run under
autocast, as in their examples. Requires transformers and lightly.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from pipeline.distributed.hardware import GPUS, keep_freed_memory, peak_flops
from pipeline.methods import build_method
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.sections import VIT_SIZES

IMAGE, MASK_RATIO = 224, 0.75
DECODER = {"width": 512, "depth": 8, "heads": 16}
OURS = {
    "mae": ("vitb16_mae",),
    "emae": ("vitb16_emae",),
    "emae, half decoded": ("vitb16_emae", "method.emae.decode_share=0.5"),
    "efficient_mae": ("vitb16_efficient_mae",),
    "lomar": ("vitb16_lomar",),
}
VIEWS = {"emae": 4, "emae, half decoded": 4}
"""Views per image. A view of EMAE is compared with an image of MAE."""
ENGINE = ", engine"
KEPT = ", memory kept"
ENCODERS = ("encoder", "timm encoder")
"""Only a forward pass of the encoder, over all patches: ours, and timm's VisionTransformer."""
PEERS = ("transformers", "lightly")
PEERS_KEPT = tuple(name + KEPT for name in PEERS)

Step = Callable[[], None]


def our_recipe(name: str, args: argparse.Namespace, *more: str) -> Recipe:
    preset, *overrides = OURS[name]
    model = (f"model.name={args.model}", f"model.patch_size={args.patch}")
    return load_recipe(preset, [*model, *overrides, *more])


def our_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    """Return the step and the forward FLOPs per image."""
    recipe = our_recipe(name, args)
    torch.manual_seed(0)
    method = build_method(recipe).to(args.device)
    masters = [p.detach().clone().requires_grad_() for p in method.parameters()]
    if args.device == "cuda":
        method = method.bfloat16()
    else:
        masters = list(method.parameters())
    optimizer = adamw(masters)
    forward = torch.compile(method, fullgraph=True, dynamic=False) if args.compile else method

    def step() -> None:
        images = torch.randn(args.batch, 3, IMAGE, IMAGE, device=args.device)
        forward(images, torch.rand(args.batch, method.noise_size, device=args.device)).loss.backward()
        if args.device == "cuda":
            for master, weight in zip(masters, method.parameters(), strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            with torch.no_grad():
                torch._foreach_copy_(list(method.parameters()), masters)

    return step, forward_flops(recipe, args.batch)


def engine_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    """Return the step of DeepSpeed's engine and the forward FLOPs per image."""
    os.environ["DS_ACCELERATOR"] = args.device
    from pipeline.distributed.launch import init_dist_env
    from pipeline.estimate.engine_step import EngineStep
    from pipeline.train import engine

    settings = {
        "engine.zero_stage": args.zero_stage,
        "engine.precision": "bf16" if args.device == "cuda" else "fp32",
        "engine.compile": str(args.compile).lower(),
        "engine.micro_batch": args.batch,
        "data.global_batch": args.batch,
    }
    recipe = our_recipe(name.removesuffix(ENGINE), args, *(f"{key}={value}" for key, value in settings.items()))
    dist_info = init_dist_env()
    engine.init_distributed(10.0, with_watchdog=False)
    step = EngineStep(recipe, dist_info)

    def train() -> None:
        step(args.batch)

    return train, forward_flops(recipe, args.batch)


def encoder_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    """Return the forward pass of an encoder; its FLOPs are given as a third, because no backward pass follows."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = build_method(our_recipe("mae", args)) if name == "encoder" else timm_encoder(args)
    forward: Callable = model.to(args.device, dtype).forward_features
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(torch.randn(1, 3, IMAGE, IMAGE, device=args.device, dtype=dtype))
    if args.compile:
        forward = torch.compile(forward, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        forward(torch.randn(args.batch, 3, IMAGE, IMAGE, device=args.device, dtype=dtype))

    return step, counter.get_total_flops() / 3


def timm_encoder(args: argparse.Namespace) -> VisionTransformer:
    size = VIT_SIZES[args.model]
    shape = {"embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    return VisionTransformer(img_size=IMAGE, patch_size=args.patch, num_classes=0, **shape)


def make_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    """Return a contestant's step, and a third of its FLOPs per image: those of a training step's forward pass."""
    if name in ENCODERS:
        return encoder_step(name, args)
    if name.endswith(ENGINE):
        return engine_step(name, args)
    return our_step(name, args) if name in OURS else peer_step(name, args)


def peer_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    torch.manual_seed(0)
    model = transformers_mae(args) if name.startswith("transformers") else lightly_mae(args)
    model.to(args.device).train()
    optimizer = adamw(list(model.parameters()))
    forward = torch.compile(model) if args.compile else model

    def step() -> None:
        images = torch.randn(args.batch, 3, IMAGE, IMAGE, device=args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = forward(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # The FLOPs of MAE, not those of the peer's implementation, so that MFU is comparable.
    recipe = load_recipe("vitb16_mae", [f"model.name={args.model}", f"model.patch_size={args.patch}"])
    return step, forward_flops(recipe, args.batch)


def adamw(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def transformers_mae(args: argparse.Namespace) -> torch.nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = VIT_SIZES[args.model]
    config = ViTMAEConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        decoder_hidden_size=DECODER["width"],
        decoder_num_hidden_layers=DECODER["depth"],
        decoder_num_attention_heads=DECODER["heads"],
        decoder_intermediate_size=4 * DECODER["width"],
        image_size=IMAGE,
        patch_size=args.patch,
        mask_ratio=MASK_RATIO,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mae = ViTMAEForPreTraining(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.mae(pixel_values=images).loss

    return Loss()


def lightly_mae(args: argparse.Namespace) -> torch.nn.Module:
    """Compose MAE as lightly's documentation does, with MAE's decoder and normalized targets."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = timm_encoder(args)
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                patch_size=args.patch,
                embed_dim=vit.embed_dim,
                decoder_embed_dim=DECODER["width"],
                decoder_depth=DECODER["depth"],
                decoder_num_heads=DECODER["heads"],
            )

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = (len(images), self.backbone.sequence_length)
            keep, mask = utils.random_token_mask(size=tokens, mask_ratio=MASK_RATIO, device=images.device)
            encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
            masked = utils.repeat_token(self.decoder.mask_token, tokens)
            masked = utils.set_at_index(masked, keep, encoded.type_as(masked))
            prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(masked), mask))
            target = utils.get_at_index(utils.patchify(images, args.patch), mask - 1)
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            return torch.nn.functional.mse_loss(prediction, (target - mean) / (variance + 1e-6).sqrt())

    return Loss()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release_memory(device: str) -> None:
    """Release freed memory, because the activations of all contestants do not fit at the same time."""
    if device == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def run_contestant(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Run in a contestant's process: receive numbers of steps, send back the seconds per step."""
    warnings.filterwarnings("ignore")
    if args.device == "cpu" and name not in PEERS:
        keep_freed_memory()
    step, flops = make_step(name, args)
    step()  # also creates the optimizer state
    memory = 0.0
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    release_memory(args.device)
    pipe.send((flops, memory))
    while steps := pipe.recv():
        step()  # not counted: it allocates the released memory again
        synchronize(args.device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(args.device)
        pipe.send((time.perf_counter() - start) / steps)
        release_memory(args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contestants = [*OURS, *(name + ENGINE for name in OURS), *ENCODERS, *PEERS, *PEERS_KEPT]
    parser.add_argument("--model", choices=list(VIT_SIZES), default="vit_base")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="turns per contestant")
    parser.add_argument("--steps", type=int, default=None, help="steps per turn (default: 1, with a GPU 10)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=contestants,
        help="contestants (default: with a GPU all methods and peers, on a CPU mae and the peers)",
    )
    parser.add_argument(
        "--zero-stage", type=int, choices=(0, 1, 2, 3), default=1, help="of the contestants with engine"
    )
    parser.add_argument("--gpu", choices=list(GPUS), help="GPU whose peak MFU refers to (default: this one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.steps = args.steps or (10 if args.device == "cuda" else 1)
    if not args.only:
        args.only = ["mae", *PEERS, *PEERS_KEPT] if args.device == "cpu" else [*OURS, *PEERS]

    pipes, facts = {}, {}
    context = multiprocessing.get_context("spawn")
    for name in args.only:
        pipes[name], child_end = context.Pipe()
        context.Process(target=run_contestant, args=(name, args, child_end), daemon=True).start()
        child_end.close()  # so that a terminated contestant raises EOFError here instead of blocking
        facts[name] = pipes[name].recv()
    times: dict[str, list[float]] = {name: [] for name in args.only}
    for number in range(args.rounds):
        # Shuffle the order, so that no contestant always runs after the same one.
        for index in np.random.default_rng(number).permutation(len(args.only)):
            name = args.only[index]
            pipes[name].send(args.steps)
            times[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(0)

    peak = GPUS[args.gpu].bits16 * 1e12 if args.gpu else peak_flops(torch.device(args.device), "bf16")
    rows = []
    for name, (flops, memory) in facts.items():
        seconds = statistics.median(times[name])
        row = {"name": name, "seconds": seconds, "images_per_s": args.batch / seconds}
        row["tflops"] = training_flops(flops) * row["images_per_s"] / 1e12
        if args.device == "cuda":
            row |= {"mfu": row["tflops"] * 1e12 / peak if peak else None, "activations_gib": memory}
        for key, peers in () if name in ENCODERS else (("peer", PEERS), ("peer_kept", PEERS_KEPT)):
            if measured := [peer for peer in peers if peer in times]:
                best = min(measured, key=lambda peer: statistics.median(times[peer]))
                row[key] = {"name": best, "ratio": ratio(times[best], times[name])}
        if name in OURS and name != "mae" and "mae" in times:
            row["mae"] = {"views": VIEWS.get(name, 1), "ratio": ratio(times["mae"], times[name])}
        if name.endswith(ENGINE) and name.removesuffix(ENGINE) in times:
            row["bare"] = {"ratio": ratio(times[name.removesuffix(ENGINE)], times[name])}
        if name == "encoder" and "timm encoder" in times:
            row["timm"] = {"ratio": ratio(times["timm encoder"], times[name])}
        rows.append(row)
    report(rows, args, peak)


def ratio(baseline: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Return the median over the rounds of baseline / ours, and its 95 % interval."""
    rounds = np.array(baseline) / np.array(ours)
    resampled = np.random.default_rng(0).choice(rounds, (2000, len(rounds)))
    low, high = np.quantile(np.median(resampled, axis=1), (0.025, 0.975))
    return float(np.median(rounds)), float(low), float(high)


def report(rows: list[dict], args: argparse.Namespace, peak: float | None) -> None:
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if args.json:
        print(json.dumps({"arguments": vars(args), "device": device, "peak_flops": peak, "rows": rows}))
        return
    if args.device == "cuda":
        known = f"peak {peak / 1e12:,.0f} TFLOP/s" if peak else "peak unknown: give --gpu for the MFU"
        device += f" ({known}{f' of {args.gpu}' if args.gpu else ''})"
    print(
        f"{args.model}, patch {args.patch}, {IMAGE} px, batch {args.batch}, {device}, "
        f"torch {torch.__version__}; median of {args.rounds} turns of {args.steps}"
    )
    for row in rows:
        line = f"{row['name']:26}{row['seconds']:7.3f} s/step{row['images_per_s']:8.2f} images/s"
        line += f"{row['tflops']:8.3f} TFLOP/s"
        if "mfu" in row:
            line += f"   MFU {row['mfu']:.1%}" if row["mfu"] is not None else ""
            line += f"   {row['activations_gib']:.1f} GiB of activations"
        for key in ("peer", "peer_kept"):
            if key in row:
                middle, low, high = row[key]["ratio"]
                line += f"   {middle:.2f} x {row[key]['name']} ({low:.2f} to {high:.2f})"
        if "mae" in row:
            views, (middle, low, high) = row["mae"]["views"], row["mae"]["ratio"]
            what = "our MAE" if views == 1 else "our MAE, per view"
            line += f"   {views * middle:.2f} x {what} ({views * low:.2f} to {views * high:.2f})"
        for key, what in (("bare", "without the engine"), ("timm", "timm's encoder")):
            if key in row:
                middle, low, high = row[key]["ratio"]
                line += f"   {middle:.2f} x {what} ({low:.2f} to {high:.2f})"
        print(line)


if __name__ == "__main__":
    main()
