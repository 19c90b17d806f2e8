"""Commands that say what training costs: in hours and memory, and of the loader."""

import argparse

from pipeline.commands.arguments import add_command, card_arguments, json_argument, positive, recipe_arguments


def add_to(commands) -> None:
    command = add_command(
        commands,
        "plan",
        _plan,
        "what a recipe costs",
        "Count a recipe's parameters, operations and memory, and estimate its hours, without running it.",
        "examples:\n  python -m pipeline plan vitl16_emae --gpus 8 --nodes 4 --gpu h100\n"
        "  python -m pipeline plan vith14_mae --mfu 0.5 --json\n"
        "  python -m pipeline plan vith14_emae --nodes 64 --link 200\n",
    )
    recipe_arguments(command)
    command.add_argument("--gpus", type=positive, default=8, metavar="N", help="GPUs a node (default: 8)")
    command.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes (default: 1)")
    card_arguments(command)
    command.add_argument(
        "--data", action="append", default=[], metavar="DIR", help="shard set (default: ImageNet's size)"
    )
    command.add_argument(
        "--link", type=float, default=400, metavar="GBIT", help="a node's link, in Gbit/s (default: 400)"
    )
    command.add_argument(
        "--storage", type=float, default=2, metavar="GB", help="the file system, in GB/s (default: 2)"
    )
    json_argument(command)

    command = add_command(
        commands,
        "bench-loader",
        _bench_loader,
        "how fast a shard set is read and decoded",
        "Measure the loader alone, by stage and threads, and set it against what a model would take.",
        "examples:\n  python -m pipeline bench-loader shards/imagenet-train\n"
        "  python -m pipeline bench-loader shards/photos --recipe vith14_mae --threads 4 8 --gpu a100\n",
    )
    command.add_argument(
        "data", nargs="+", metavar="DATA", help="shard set, made by data_prep; several as one"
    )
    recipe_arguments(command, default="vitl16_mae")
    command.add_argument(
        "--threads",
        type=positive,
        nargs="+",
        metavar="N",
        help="decoding threads (default: 1, 2, 4, ... up to the cores)",
    )
    command.add_argument(
        "--seconds", type=positive, default=20, metavar="N", help="for each number (default: 20)"
    )
    card_arguments(command)
    json_argument(command)


def _plan(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from pipeline.data.reader import ShardReader
    from pipeline.estimate.network import estimate_scaling, format_scaling
    from pipeline.estimate.plan import format_plan, plan
    from pipeline.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    sizes = {}
    if args.data or recipe.data.sources:
        reader = ShardReader(recipe.sources(args.data), recipe.data)
        sizes = {"samples": reader.num_samples, "shards": len(reader.shard_sizes)}
    hardware = {"gpus": args.gpus, "nodes": args.nodes, "gpu": args.gpu, "mfu": args.mfu}
    costs = plan(recipe, **hardware, **sizes)
    scale = estimate_scaling(recipe, **hardware, link_gbit=args.link, storage_gb=args.storage)
    if args.json:
        print(json.dumps(asdict(costs) | {"scaling": asdict(scale)}, indent=1))
    else:
        print(format_plan(costs) + ("\n\n" + format_scaling(scale) if args.nodes > 1 else ""))


def _bench_loader(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from pipeline.distributed.launch import init_dist_env
    from pipeline.estimate.bench_loader import bench_loader, format_bench
    from pipeline.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    world = init_dist_env()
    threads = args.threads or [2**n for n in range(world.num_cpus.bit_length())]
    result = bench_loader(
        recipe.sources(args.data), recipe, world.device, threads, args.seconds, args.gpu, args.mfu
    )
    print(json.dumps(asdict(result), indent=1) if args.json else format_bench(result))
