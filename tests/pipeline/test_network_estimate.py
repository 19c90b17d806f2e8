import pytest

from pipeline.errors import UserError
from pipeline.estimate.network import estimate_scaling
from pipeline.estimate.plan import plan
from pipeline.methods.flops import forward_flops
from pipeline.recipe import load_recipe

HARDWARE = {"gpus": 8, "gpu": "h100", "mfu": 0.5, "storage_gb": 2.0}


def test_one_node_needs_no_link_and_is_the_plans_speed():
    recipe = load_recipe("vitl16_mae")
    (one,) = estimate_scaling(recipe, nodes=1, link_gbit=1, **HARDWARE).scales
    assert set(one.link_gb.values()) == {0.0} and set(one.efficiency.values()) == {1.0}
    assert one.images_per_s == pytest.approx(plan(recipe, gpus=8, nodes=1, mfu=0.5).images_per_s)


def test_a_slow_link_by_hand():
    recipe = load_recipe("vitl16_mae", ["engine.micro_batch=64"])
    two = estimate_scaling(recipe, nodes=2, link_gbit=8, **HARDWARE).scales[-1]
    assert (two.nodes, two.gpus, two.micro_batch, two.accumulation) == (2, 16, 64, 4)
    compute = 256 * 3 * forward_flops(recipe, 64) / (0.5 * 989e12)
    once = 329.5e6 * 2 / 1e9 / 2  # 329.5 M weights in bfloat16, GB; half of it between two nodes
    sums = 2 * once  # the gradients' are in float32
    carried = {0: 2 * sums, 1: 2 * sums + once, 2: 8 * sums + once, 3: 4 * sums + 8 * once}
    assert two.link_gb == pytest.approx(carried, rel=1e-3)
    backward = 2 / 3 * compute
    expected = {
        0: compute + 2 * sums,
        1: compute + 2 * sums + once,
        2: compute + max(0, 8 * sums - backward) + once,
        3: compute + max(0, 4 * sums + 4 * once - backward) + 4 * once,
    }
    assert two.step_s == pytest.approx(expected, rel=1e-3)


def test_in_fp16_zero_1_sends_gradients_of_16_bits_and_during_the_backward_pass():
    two = estimate_scaling(
        load_recipe("vitl16_mae", ["engine.precision=fp16"]), nodes=2, link_gbit=800, **HARDWARE
    ).scales[-1]
    once = 329.5e6 * 2 / 1e9 / 2
    assert two.link_gb[1] == pytest.approx(3 * once, rel=1e-3)
    assert two.step_s[1] == pytest.approx(two.compute_s + once / 100, rel=1e-4)


def test_efficiency_falls_with_nodes_and_rises_with_the_link():
    recipe = load_recipe("vith14_emae", ["engine.micro_batch=8"])
    slow, fast = (estimate_scaling(recipe, nodes=64, link_gbit=link, **HARDWARE) for link in (50, 400))
    assert [scale.nodes for scale in slow.scales] == [1, 2, 4, 8, 16, 32, 64]
    for stage in range(4):
        falling = [scale.efficiency[stage] for scale in slow.scales]
        assert falling == sorted(falling, reverse=True) and falling[-1] < 1
        assert slow.scales[-1].efficiency[stage] < fast.scales[-1].efficiency[stage]


def test_numbers_of_nodes_that_cannot_share_the_batch_are_left_out():
    scales = estimate_scaling(load_recipe("vitl16_mae"), nodes=3, link_gbit=100, **HARDWARE).scales
    assert [scale.nodes for scale in scales] == [1, 2]


@pytest.mark.parametrize("wrong", [{"link_gbit": 0}, {"link_gbit": 100, "storage_gb": -1}])
def test_a_rate_that_is_not_positive_is_refused(wrong):
    with pytest.raises(UserError, match="must be positive"):
        estimate_scaling(load_recipe("vitl16_mae"), nodes=2, **HARDWARE | wrong)
