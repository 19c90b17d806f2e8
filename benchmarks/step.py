"""One training step of our methods beside transformers' ViTMAE and lightly's MAE, in one run on one machine.

    python benchmarks/step.py                                     MAE, ViT-B, CPU, float32
    python benchmarks/step.py --only mae emae efficient_mae lomar     our methods alone
    python benchmarks/step.py --model vit_large --batch 128       with a GPU: bfloat16
    python benchmarks/step.py --model vit_huge --patch 14 --batch 64 --compile --only mae efficient_mae

A step is forward, backward and AdamW on random images; no loader, no network. The contestants take turns,
each in a process of its own, so that a machine that slows down slows all of them and none lives on memory
that another has freed. What counts is the median of the turns, and for a ratio the median over the rounds,
with its 95 % interval (bootstrap).

On a CPU ours hold memory as our runs do (pipeline/distributed/host_memory.py), the peers as they come; with
"memory kept" beside its name a peer holds it as ours. On a GPU ours hold bfloat16 weights with float32
masters, as DeepSpeed does; the peers run under autocast, as their own examples do. Needs transformers and
lightly.
"""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch

from pipeline.distributed.hardware import GPUS, keep_freed_memory
from pipeline.methods import build_method
from pipeline.methods.flops import forward_flops, training_flops
from pipeline.recipe import load_recipe
from pipeline.recipe.sections import SIZES

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
"""Of an image. A view of EMAE's is compared with an image of MAE's."""
KEPT = ", memory kept"
PEERS = ("transformers", "lightly")
PEERS_KEPT = tuple(name + KEPT for name in PEERS)

Step = Callable[[], None]


def our_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    """-> the step, and the operations of an image's share of a forward pass."""
    preset, *overrides = OURS[name]
    model = (f"model.name={args.model}", f"model.patch_size={args.patch}")
    recipe = load_recipe(preset, [*model, *overrides])
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


def peer_step(name: str, args: argparse.Namespace) -> tuple[Step, float]:
    torch.manual_seed(0)
    loss_of = transformers_mae(args) if name.startswith("transformers") else lightly_mae(args)
    loss_of.to(args.device).train()
    optimizer = adamw(list(loss_of.parameters()))
    forward = torch.compile(loss_of) if args.compile else loss_of

    def step() -> None:
        images = torch.randn(args.batch, 3, IMAGE, IMAGE, device=args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = forward(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # The work that MAE asks for, not what a peer spends on it: MFU is then comparable.
    recipe = load_recipe("vitb16_mae", [f"model.name={args.model}", f"model.patch_size={args.patch}"])
    return step, forward_flops(recipe, args.batch)


def adamw(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def transformers_mae(args: argparse.Namespace) -> torch.nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    size = SIZES[args.model]
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
    """As lightly's documentation composes it, with MAE's decoder and normalised targets."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    size = SIZES[args.model]

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = VisionTransformer(
                img_size=IMAGE,
                patch_size=args.patch,
                embed_dim=size.width,
                depth=size.depth,
                num_heads=size.heads,
                num_classes=0,
            )
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                patch_size=args.patch,
                embed_dim=size.width,
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


def leave_memory(device: str) -> None:
    """What a step has freed goes to the others: all contestants' activations would not fit side by side."""
    if device == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def contestant(name: str, args: argparse.Namespace, wire: Connection) -> None:
    """The life of a contestant's process: for each number of steps asked, the seconds a step took."""
    warnings.filterwarnings("ignore")
    if args.device == "cpu" and name not in PEERS:
        keep_freed_memory()
    step, flops = (our_step if name in OURS else peer_step)(name, args)
    step()  # makes the optimizer's state, too
    memory = 0.0
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    leave_memory(args.device)
    wire.send((flops, memory))
    while steps := wire.recv():
        step()  # does not count: it takes memory back that was left to the others
        synchronize(args.device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(args.device)
        wire.send((time.perf_counter() - start) / steps)
        leave_memory(args.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    everyone = [*OURS, *PEERS, *PEERS_KEPT]
    parser.add_argument("--model", choices=list(SIZES), default="vit_base")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=None, help="steps a turn; default 1, with a GPU 10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None)
    parser.add_argument("--compile", action="store_true", help="torch.compile every contestant")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=everyone,
        help="default: with a GPU all methods and peers, on a CPU mae and the peers",
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="whose peak MFU refers to")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.steps = args.steps or (10 if args.device == "cuda" else 1)
    if not args.only:
        args.only = ["mae", *PEERS, *PEERS_KEPT] if args.device == "cpu" else [*OURS, *PEERS]

    wires, facts = {}, {}
    context = multiprocessing.get_context("spawn")
    for name in args.only:
        wires[name], theirs = context.Pipe()
        context.Process(target=contestant, args=(name, args, theirs), daemon=True).start()
        theirs.close()  # a contestant that dies is then an EOFError here, not a wait without end
        facts[name] = wires[name].recv()
    times: dict[str, list[float]] = {name: [] for name in args.only}
    for number in range(args.rounds):
        # In another order each time: nobody always runs after the same neighbour.
        for index in np.random.default_rng(number).permutation(len(args.only)):
            name = args.only[index]
            wires[name].send(args.steps)
            times[name].append(wires[name].recv())
    for wire in wires.values():
        wire.send(0)

    peak = GPUS[args.gpu].bits16 * 1e12
    rows = []
    for name, (flops, memory) in facts.items():
        seconds = statistics.median(times[name])
        row = {"name": name, "seconds": seconds, "images_per_s": args.batch / seconds}
        row["tflops"] = training_flops(flops) * row["images_per_s"] / 1e12
        if args.device == "cuda":
            row |= {"mfu": row["tflops"] * 1e12 / peak, "activations_gib": memory}
        for key, peers in (("peer", PEERS), ("peer_kept", PEERS_KEPT)):
            if known := [peer for peer in peers if peer in times]:
                better = min(known, key=lambda peer: statistics.median(times[peer]))
                row[key] = {"name": better, "ratio": ratio(times[better], times[name])}
        if name in OURS and name != "mae" and "mae" in times:
            row["mae"] = {"views": VIEWS.get(name, 1), "ratio": ratio(times["mae"], times[name])}
        rows.append(row)
    report(rows, args)


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median over the rounds of their time over ours, and the 95 % interval of that median."""
    rounds = np.array(theirs) / np.array(ours)
    drawn = np.random.default_rng(0).choice(rounds, (2000, len(rounds)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(np.median(rounds)), float(low), float(high)


def report(rows: list[dict], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"arguments": vars(args), "rows": rows}))
        return
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{args.model}, patch {args.patch}, {IMAGE} px, batch {args.batch}, {where}, "
        f"torch {torch.__version__}; median of {args.rounds} turns of {args.steps}"
    )
    for row in rows:
        line = f"{row['name']:26}{row['seconds']:7.3f} s/step{row['images_per_s']:8.2f} images/s"
        line += f"{row['tflops']:8.3f} TFLOP/s"
        if "mfu" in row:
            line += f"   MFU {row['mfu']:.1%}   {row['activations_gib']:.1f} GiB more at its peak"
        for key in ("peer", "peer_kept"):
            if key in row:
                middle, low, high = row[key]["ratio"]
                line += f"   {middle:.2f} x {row[key]['name']} ({low:.2f} to {high:.2f})"
        if "mae" in row:
            views, (middle, low, high) = row["mae"]["views"], row["mae"]["ratio"]
            what = "our MAE" if views == 1 else "our MAE, a view"
            line += f"   {views * middle:.2f} x {what} ({views * low:.2f} to {views * high:.2f})"
        print(line)


if __name__ == "__main__":
    main()
