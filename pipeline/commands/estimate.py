"""The commands plan and bench-loader."""

import argparse
from typing import Any

from pipeline.commands.arguments import (
    add_command,
    add_gpu_arguments,
    add_json_argument,
    add_recipe_arguments,
    positive_int,
)


def add_to(commands) -> None:
    command = add_command(
        commands,
        "plan",
        _plan,
        "estimate what a recipe costs",
        "Count a recipe's parameters, FLOPs and memory, and estimate its hours, without running it.",
        "examples:\n  python -m pipeline plan vitl16_emae --gpus 8 --nodes 4 --gpu h100\n"
        "  python -m pipeline plan vith14_mae --mfu 0.5 --json\n"
        "  python -m pipeline plan vith14_emae --nodes 64 --link 200\n"
        "  python -m pipeline plan detect_vitb16 --nodes 4\n",
    )
    add_recipe_arguments(command)
    command.add_argument("--gpus", type=positive_int, default=8, metavar="N", help="per node (default: 8)")
    command.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="nodes (default: 1)")
    add_gpu_arguments(command)
    command.add_argument(
        "--data", action="append", default=[], metavar="DIR", help="shard set (default: ImageNet's size)"
    )
    link = "Gbit/s of a node's network adapters together (default: those of NVIDIA's system with this GPU)"
    storage = "GB/s of the file system (default: 2)"
    command.add_argument("--link", type=float, metavar="GBIT", help=link)
    command.add_argument("--storage", type=float, default=2, metavar="GB", help=storage)
    add_json_argument(command)

    command = add_command(
        commands,
        "bench-loader",
        _bench_loader,
        "measure how fast a shard set is read and decoded",
        "Measure the loader alone, by stage and threads, and compare it with what a model consumes.",
        "examples:\n  python -m pipeline bench-loader shards/imagenet-train\n"
        "  python -m pipeline bench-loader shards/photos --recipe vith14_mae --threads 4 8 --gpu a100\n",
    )
    command.add_argument("data", nargs="+", metavar="DATA", help="shard set made by data_prep; several are read as one")
    add_recipe_arguments(command, default="vitl16_mae")
    threads, seconds = "decoding threads (default: 1, 2, 4, ...)", "per number of threads (default: 20)"
    command.add_argument("--threads", type=positive_int, nargs="+", metavar="N", help=threads)
    command.add_argument("--seconds", type=positive_int, default=20, metavar="N", help=seconds)
    add_gpu_arguments(command)
    add_json_argument(command)


def _plan(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from pipeline.data.reader import ShardReader
    from pipeline.estimate.network import estimate_scaling, format_scaling
    from pipeline.estimate.plan import format_plan, plan
    from pipeline.recipe import load_recipe
    from pipeline.recipe.loading import find_recipe, read_yaml

    path = find_recipe(args.recipe)
    if "task" in read_yaml(path):
        _plan_finetune(args)
        return
    recipe = load_recipe(args.recipe, args.overrides)
    sizes: dict[str, Any] = {}
    if args.data or recipe.data.sources:
        reader = ShardReader(recipe.resolve_sources(args.data), recipe.data)
        sizes = {"samples": reader.num_samples, "shards": len(reader.shard_sizes)}
    hardware: dict[str, Any] = {"gpus": args.gpus, "nodes": args.nodes, "gpu": args.gpu, "mfu": args.mfu}
    cost = plan(recipe, **hardware, **sizes)
    scaling = estimate_scaling(recipe, **hardware, link_gbit=args.link, storage_gb=args.storage)
    if args.json:
        print(json.dumps(asdict(cost) | {"scaling": asdict(scaling)}, indent=1))
    else:
        print(format_plan(cost) + ("\n\n" + format_scaling(scaling) if args.nodes > 1 else ""))


def _plan_finetune(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from pipeline.data.reader import ShardReader
    from pipeline.recipe.tasks import load_finetune_recipe
    from pipeline.tasks.finetune_plan import format_finetune_plan, plan_finetune

    recipe = load_finetune_recipe(args.recipe, "", args.overrides)
    samples = {"samples": ShardReader(recipe.resolve_sources(args.data)).num_samples} if args.data else {}
    cost = plan_finetune(recipe, gpus=args.gpus, nodes=args.nodes, gpu=args.gpu, mfu=args.mfu, **samples)
    print(json.dumps(asdict(cost), indent=1) if args.json else format_finetune_plan(cost))


def _bench_loader(args: argparse.Namespace) -> None:
    import json

    from pipeline.distributed.launch import init_dist_env
    from pipeline.estimate.bench_loader import bench_loader, format_bench
    from pipeline.estimate.plan import resolve_recipe
    from pipeline.recipe import load_recipe
    from pipeline.recipe.sections import is_auto
    from pipeline.train.micro_batch import CPU_MICRO_BATCH

    recipe, dist_info = load_recipe(args.recipe, args.overrides), init_dist_env()
    if is_auto(recipe.engine.micro_batch) and dist_info.device.type == "cpu":
        recipe = recipe.with_micro_batch(CPU_MICRO_BATCH)
    recipe = resolve_recipe(recipe, 1, args.gpu)
    threads = args.threads or [2**n for n in range(dist_info.num_cpus.bit_length())]
    result = bench_loader(
        recipe.resolve_sources(args.data), recipe, dist_info.device, threads, args.seconds, args.gpu, args.mfu
    )
    print(json.dumps(result, indent=1) if args.json else format_bench(result))
