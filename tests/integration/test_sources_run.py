"""A run on several shard sets of a recipe reads the same pixels on one rank and on two."""

import json

from runs import SMALL

from pipeline.data.reader import ShardReader
from pipeline.recipe import load_recipe


def read_trace(run, kind):
    """Return (step, key and, for pixels, digest) of all ranks, sorted."""
    files = (run.directory / "samples").glob(f"{kind}-*.txt")
    return sorted(tuple(line.split(" ")) for path in files for line in path.read_text().splitlines())


def test_mixture_reads_the_same_pixels_on_two_ranks_as_on_one(run, other_run, shards, other_shards):
    sources = [{"path": str(shards), "weight": 2}, {"path": str(other_shards), "weight": 1}]
    settings = {"data__sources": json.dumps(sources), "data__holdout": 0.1, "data__trace": True}
    run.shards = other_run.shards = None
    one = other_run.train(1, train__steps=6, **settings)
    two = run.train(2, train__steps=6, **settings)
    assert [line["epoch"] for line in one] == [line["epoch"] for line in two]
    for kind in ("rank", "pixels-rank"):
        assert read_trace(run, kind) == read_trace(other_run, kind)
        assert len(read_trace(run, kind)) == 6 * SMALL["data.global_batch"]

    recipe = load_recipe(run.directory / "recipe.yaml")
    held_out = ShardReader(recipe.resolve_sources([]), recipe.data, "held_out")
    keys = {held_out.key(shard, index) for shard, n in enumerate(held_out.shard_sizes) for index in range(n)}
    assert keys and not keys & {key for _, key in read_trace(run, "rank")}
