"""The model of communication between nodes, compared with counts by hand."""

import pytest

from pipeline.errors import UserError
from pipeline.estimate.network import estimate_scaling
from pipeline.estimate.plan import plan
from pipeline.methods.flops import forward_flops
from pipeline.recipe import load_recipe

HARDWARE = {"gpus": 8, "gpu": "h100", "mfu": 0.5, "storage_gb": 2.0}


def test_one_node_has_the_speed_of_plan():
    recipe = load_recipe("vitl16_mae")
    (one,) = estimate_scaling(recipe, nodes=1, link_gbit=1, **HARDWARE).scales
    assert set(one.link_gb.values()) == {0.0} and set(one.efficiency.values()) == {1.0}
    assert one.images_per_s == pytest.approx(plan(recipe, gpus=8, nodes=1, mfu=0.5).images_per_s)


def test_a_slow_link_costs_what_a_count_by_hand_gives():
    recipe = load_recipe("vitl16_mae", ["engine.micro_batch=64"])
    two = estimate_scaling(recipe, nodes=2, link_gbit=8, **HARDWARE).scales[-1]
    assert (two.nodes, two.gpus, two.micro_batch, two.accumulation) == (2, 16, 64, 4)
    compute = 256 * 3 * forward_flops(recipe, 64) / (0.5 * 989e12)
    weights = 329.5e6 * 2 / 1e9 / 2  # GB: 329.5 M weights in bf16, half of them between two nodes
    grads = 2 * weights  # in fp32
    link_gb = {0: 2 * grads, 1: 2 * grads + weights, 2: 8 * grads + weights, 3: 4 * grads + 8 * weights}
    assert two.link_gb == pytest.approx(link_gb, rel=1e-3)
    backward = 2 / 3 * compute
    expected = {
        0: compute + 2 * grads,
        1: compute + 2 * grads + weights,
        2: compute + max(0, 8 * grads - backward) + weights,
        3: compute + max(0, 4 * grads + 4 * weights - backward) + 4 * weights,
    }
    assert two.step_s == pytest.approx(expected, rel=1e-3)


def test_fp16_zero_1_overlaps_16_bit_gradients():
    two = estimate_scaling(
        load_recipe("vitl16_mae", ["engine.precision=fp16"]), nodes=2, link_gbit=800, **HARDWARE
    ).scales[-1]
    weights = 329.5e6 * 2 / 1e9 / 2
    assert two.link_gb[1] == pytest.approx(3 * weights, rel=1e-3)
    assert two.step_s[1] == pytest.approx(two.compute_s + weights / 100, rel=1e-4)


def test_efficiency_falls_with_nodes_and_rises_with_the_link():
    recipe = load_recipe("vith14_emae", ["engine.micro_batch=8"])
    slow, fast = (estimate_scaling(recipe, nodes=64, link_gbit=link, **HARDWARE) for link in (50, 400))
    assert [scale.nodes for scale in slow.scales] == [1, 2, 4, 8, 16, 32, 64]
    for stage in range(4):
        falling = [scale.efficiency[stage] for scale in slow.scales]
        assert falling == sorted(falling, reverse=True) and falling[-1] < 1
        assert slow.scales[-1].efficiency[stage] < fast.scales[-1].efficiency[stage]


def test_node_counts_that_do_not_divide_the_batch_are_omitted():
    scales = estimate_scaling(load_recipe("vitl16_mae"), nodes=3, link_gbit=100, **HARDWARE).scales
    assert [scale.nodes for scale in scales] == [1, 2]


@pytest.mark.parametrize(("gpu", "gbit"), [("a100", 8 * 200), ("h100", 8 * 400), ("rtx4090", 400)])
def test_the_default_link_is_that_of_nvidias_system(gpu, gbit):
    recipe = load_recipe("vitl16_mae", ["engine.micro_batch=8"])
    hardware = {**HARDWARE, "gpu": gpu, "nodes": 2}
    assert estimate_scaling(recipe, **hardware) == estimate_scaling(recipe, link_gbit=gbit, **hardware)


def test_auto_is_chosen_for_each_number_of_nodes():
    scales = estimate_scaling(load_recipe("vitl16_mae"), nodes=64, **HARDWARE).scales
    assert [(scale.nodes, scale.micro_batch, scale.accumulation) for scale in scales] == [
        (1, 512, 1),
        (2, 256, 1),
        (4, 128, 1),
        (8, 64, 1),
        (16, 32, 1),
        (32, 16, 1),
        (64, 8, 1),
    ]


@pytest.mark.parametrize("rates", [{"link_gbit": 0}, {"link_gbit": 100, "storage_gb": -1}])
def test_a_rate_must_be_positive(rates):
    with pytest.raises(UserError, match="must be positive"):
        estimate_scaling(load_recipe("vitl16_mae"), nodes=2, **HARDWARE | rates)
