"""P2Dist and the metrics of Table 5 against loops over pixels in float64 and figures from the paper."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.difficulty import difficulty, patch_distance
from pipeline.losses import difficulty_flatten_loss, weighted_mean
from pipeline.methods.flops import forward_flops
from pipeline.recipe import load_recipe


def masks(count: int, ratio: float, grid: int = 14) -> torch.Tensor:
    """Draw MAE's random masks: bool (count, grid, grid), true for visible patches."""
    noise = torch.rand(count, grid * grid, generator=torch.Generator().manual_seed(0))
    visible = torch.zeros(count, grid * grid, dtype=torch.bool)
    visible.scatter_(1, noise.argsort(dim=1)[:, : int(grid * grid * (1 - ratio))], True)
    return visible.view(count, grid, grid)


def pixel_centers(row: int, column: int, p: int) -> np.ndarray:
    """Centers of a patch's pixels, (P*P, 2)."""
    y, x = np.mgrid[0:p, 0:p]
    return np.stack([row * p + y.ravel() + 0.5, column * p + x.ravel() + 0.5], axis=1).astype(np.float64)


def equation_1(visible: np.ndarray, p: int) -> np.ndarray:
    visible_patches = [pixel_centers(r, c, p) for r, c in zip(*np.nonzero(visible), strict=True)]
    distance = np.zeros(visible.shape)
    for r, c in zip(*np.nonzero(~visible), strict=True):
        mean = 0.0
        for pixel in pixel_centers(r, c, p):
            mean += min(np.hypot(*(patch - pixel).T).min() for patch in visible_patches) / p**2
        distance[r, c] = mean
    return distance


def algorithm_1(visible: np.ndarray, p: int, k: int) -> np.ndarray:
    """On integer pixel coordinates, with a patch's center at P / 2."""
    offsets = [(a, b) for a in (-p / 2, 0, p / 2) for b in (-p / 2, 0, p / 2)]
    centers = [((r + 0.5) * p, (c + 0.5) * p) for r, c in zip(*np.nonzero(visible), strict=True)]
    points = sorted({(y + a, x + b) for y, x in centers for a, b in offsets})
    distance = np.zeros(visible.shape)
    for r, c in zip(*np.nonzero(~visible), strict=True):
        center = ((r + 0.5) * p, (c + 0.5) * p)
        nearest = sorted(points, key=lambda point: math.dist(point, center))[:k]  # ties: raster order
        pixels = [(r * p + y, c * p + x) for y in range(p) for x in range(p)]
        distance[r, c] = np.mean([min(math.dist(pixel, q) for q in nearest) for pixel in pixels])
    return distance


@st.composite
def small_masks(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cells = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns).filter(any))
    return np.array(cells).reshape(rows, columns)


@settings(max_examples=60)
@given(small_masks(), st.integers(1, 6))
def test_exact_p2dist_equals_equation_1(visible, patch):
    ours = patch_distance(torch.tensor(visible)[None], patch, exact=True)[0]
    assert np.allclose(ours.numpy(), equation_1(visible, patch), atol=1e-4)


@settings(max_examples=60)
@given(small_masks(), st.integers(1, 6), st.integers(1, 12))
def test_approximate_p2dist_equals_algorithm_1(visible, patch, k):
    ours = patch_distance(torch.tensor(visible)[None], patch, k=k)[0]
    assert np.allclose(ours.numpy(), algorithm_1(visible, patch, k), atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_an_image_does_not_depend_on_its_batch(exact):
    batch = masks(6, 0.85)
    distance = patch_distance(batch, 16, exact)
    for i in range(6):
        assert torch.equal(distance[i : i + 1], patch_distance(batch[i : i + 1], 16, exact))
    assert distance.dtype == torch.float32 and not distance[batch].any() and (distance[~batch] > 0).all()


def test_distance_is_infinite_if_no_patch_is_visible():
    for exact in (True, False):
        assert patch_distance(torch.zeros(1, 3, 3, dtype=torch.bool), 4, exact).isinf().all()


@pytest.mark.parametrize(("ratio", "share"), [(0.75, 0.87), (0.85, 0.68), (0.90, 0.52)])
def test_share_with_a_visible_neighbor_matches_section_3_3(ratio, share):
    visible = masks(1000, ratio)
    finite = difficulty(visible, 16, "neighbors_3x3", False, 8)[~visible].isfinite()
    assert abs(finite.float().mean().item() - share) < 0.01


@pytest.mark.parametrize(("exact", "counts"), [(True, (76, 114, 145)), (False, (78, 114, 150))])
def test_number_of_patches_within_a_threshold(exact, counts):
    """Table 8 of the paper has 82, 114 and 150 patches within 9, 13 and 26 px at mask ratio 0.85."""
    visible = masks(300 if exact else 1000, 0.85)
    distance = torch.cat([patch_distance(part, 16, exact) for part in visible.split(100)])
    for beta, count in zip((9, 13, 26), counts, strict=True):
        assert abs(((distance <= beta) & ~visible).sum().item() / len(visible) - count) < 1


def test_approximate_p2dist_is_within_half_a_pixel_of_exact():
    visible = masks(200, 0.85)
    difference = (patch_distance(visible, 16) - patch_distance(visible, 16, exact=True))[~visible].abs()
    assert difference.mean() < 0.5


class ElementCount(TorchDispatchMode):
    """Count the elements that operations write; sort, top-k and max-pool count ten per element read."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        cost = 10 if "topk" in name or "sort" in name or "max_pool" in name else 1
        for tensor in torch.utils._pytree.tree_leaves(args[0] if cost > 1 else out):
            if isinstance(tensor, torch.Tensor):
                self.operations += cost * tensor.numel()
        return out


@pytest.mark.parametrize("exact", [False, True])
def test_p2dist_needs_under_0_02_percent_of_a_vit_l_steps_flops(exact):
    with ElementCount() as count:
        patch_distance(masks(256, 0.85), 16, exact)
    step = 3 * 256 * forward_flops(load_recipe("vitl16_efficient_mae"))
    assert 0 < count.operations < 0.0002 * step


def test_metrics_of_table_5_equal_their_definition():
    visible = np.zeros((5, 6), dtype=bool)
    visible[[0, 1, 4], [0, 3, 5]] = True
    mask = torch.tensor(visible)[None]
    ours = {name: difficulty(mask, 16, name, False, 8)[0].numpy() for name in TABLE_5}
    for r in range(5):
        for c in range(6):
            offsets = [(r - y, c - x) for y, x in zip(*np.nonzero(visible), strict=True)]
            neighbors = sum(max(map(abs, offset)) <= 1 for offset in offsets)
            ease = sum(1 / math.hypot(*o) for o in offsets if 0 < max(map(abs, o)) <= 2)
            nearest = 16 * min(math.hypot(*offset) for offset in offsets)
            expected = (1 / neighbors if neighbors else math.inf, 1 / ease if ease else math.inf, nearest)
            for name, value in zip(TABLE_5, expected, strict=True):
                assert np.isclose(ours[name][r, c], 0 if visible[r, c] else value)


TABLE_5 = ("neighbors_3x3", "inverse_distance_5x5", "nearest_patch")


@pytest.mark.parametrize(("metric", "patches"), list(zip(TABLE_5, (114, 159, 167), strict=True)))
def test_number_of_finite_difficulties_matches_table_5(metric, patches):
    visible = masks(1000, 0.85)
    finite = difficulty(visible, 16, metric, False, 8).isfinite() & ~visible
    assert abs(finite.sum().item() / 1000 - patches) < 1


def equation_2(error, distance, gamma, keep) -> float:
    per_image = []
    for e, d, k in zip(error, distance, keep, strict=True):
        weights = [x ** (-gamma) if is_kept else 0.0 for x, is_kept in zip(d, k, strict=True)]
        total = sum(w * x for w, x in zip(weights, e, strict=True))
        per_image.append(total / sum(weights) if any(k) else 0.0)
    return sum(per_image) / len(per_image)


@given(st.integers(1, 4), st.integers(1, 8), st.floats(0, 3), st.integers(0, 10**6), st.booleans())
def test_difficulty_flatten_loss_equals_equation_2(batch, count, gamma, seed, all_kept):
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(batch, count, generator=generator)
    distance = torch.rand(batch, count, generator=generator) * 40 + 1
    keep = torch.ones(batch, count, dtype=torch.bool)
    if not all_kept:
        keep = torch.rand(batch, count, generator=generator) > 0.4
    expected = equation_2(error.double().tolist(), distance.double().tolist(), gamma, keep.tolist())
    ours = difficulty_flatten_loss(error, distance, gamma, None if all_kept else keep)
    assert math.isclose(ours.item(), expected, rel_tol=1e-5, abs_tol=1e-7)


def test_patches_not_kept_affect_neither_loss_nor_gradient():
    error = torch.tensor([[1.0, math.nan, 2.0, 5.0]], requires_grad=True)
    distance = torch.tensor([[4.0, 0.0, 9.0, math.inf]])
    keep = torch.tensor([[True, False, True, True]])
    loss = difficulty_flatten_loss(error, distance, 0.5, keep)
    loss.backward()
    assert math.isclose(loss.item(), (1 / 2 + 2 / 3) / (1 / 2 + 1 / 3), rel_tol=1e-6)
    assert error.grad[0, [1, 3]].tolist() == [0, 0] and (error.grad[0, [0, 2]] > 0).all()


def test_difficulty_flatten_gradients_equal_finite_differences():
    error = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    distance, keep = torch.rand(2, 5, dtype=torch.float64) * 20 + 1, torch.rand(2, 5) > 0.3
    assert torch.autograd.gradcheck(lambda e: difficulty_flatten_loss(e, distance, 0.6, keep), error)
    assert torch.autograd.gradcheck(lambda e: weighted_mean(e, distance * keep), error)


def test_an_unknown_metric_raises():
    with pytest.raises(ValueError, match="metric: 'area'"):
        difficulty(masks(1, 0.5), 16, "area", False, 8)
