"""Augmentations on tensors have Pillow's and timm's pixels and the papers' distributions."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp, kstest
from timm.data import auto_augment
from timm.data.mixup import Mixup, rand_bbox
from timm.data.random_erasing import RandomErasing

from pipeline.data.augment import mixup, rand_augment, random_erasing
from pipeline.data.philox import Purpose, uniform

FILL = torch.tensor([124.0, 116.0, 104.0])
TIMMS = dict(zip(rand_augment.OPERATIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))

SEEDS = {1: 1, -1: 0}
"""For each sign, a seed with which the first number of Python's generator makes timm draw it."""


def uniform_noise(count: int, width: int, epoch: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniform(0, Purpose.MASK, epoch, np.arange(count), width))


@pytest.fixture(scope="module")
def images(photographs) -> list[Image.Image]:
    """Photographs and flat images of 64 x 48 px."""
    paths = sorted(p for p in photographs.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:10]
    resized = [Image.open(path).convert("RGB").resize((64, 48)) for path in paths]
    return [*resized, Image.new("RGB", (64, 48), (7, 7, 7)), Image.new("RGB", (64, 48), (255, 0, 128))]


def as_levels(images: list[Image.Image]) -> torch.Tensor:
    arrays = [np.asarray(image, np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.0, 0.37, 0.9, 0.99])
def test_operation_gives_timms_pixels(images, name, sign, strength):
    hparams = {"img_mean": tuple(int(value) for value in FILL), "interpolation": Image.Resampling.BICUBIC}
    op = auto_augment.AugmentOp(TIMMS[name], prob=1.0, magnitude=10 * strength, hparams=hparams)
    theirs = []
    for image in images:
        random.seed(SEEDS[sign])  # the sign is the only number that timm draws here
        theirs.append(op(image))
    count = len(images)
    operation = torch.full((count,), rand_augment.OPERATIONS.index(name))
    strengths, signs = torch.full((count,), strength), torch.full((count,), float(sign))
    ours = rand_augment.apply_operations(as_levels(images), operation, strengths, signs, FILL)
    assert (ours == ours.floor()).all() and ours.min() >= 0 and ours.max() <= 255
    difference = (ours - as_levels(theirs)).abs()
    assert difference.max() <= 1 and difference.mean() < 0.02


def test_rand_augment_draws_layers_and_operations_uniformly(images):
    levels = as_levels(images[:1]).expand(400, -1, -1, -1)
    noise = uniform_noise(400, rand_augment.NOISE_DIM)
    ours = rand_augment.rand_augment(levels, noise, 9.0, 0.5, FILL)
    unchanged = ((ours - levels).abs().amax((1, 2, 3)) == 0).float().mean().item()
    assert 0.17 < unchanged < 0.36  # 1/2 x 1/2, and a few operations that change nothing here
    choices = uniform_noise(20_000, rand_augment.NOISE_DIM)[:, :: rand_augment.NOISE_PER_LAYER]
    shares = torch.bincount((choices * 15).long().flatten()).double() / choices.numel()
    assert len(shares) == 15 and (shares - 1 / 15).abs().max() < 0.005


def test_augmentation_depends_on_the_images_own_noise_only(images):
    levels, noise = as_levels(images), uniform_noise(len(images), rand_augment.NOISE_DIM)
    normalized, key = (levels - 128) / 64, uniform_noise(len(images), random_erasing.NOISE_DIM, 1)
    for row in range(len(images)):
        one = slice(row, row + 1)
        alone = rand_augment.rand_augment(levels[one], noise[one], 9.0, 0.5, FILL)
        assert torch.equal(alone[0], rand_augment.rand_augment(levels, noise, 9.0, 0.5, FILL)[row])
        alone = random_erasing.erase(normalized[one], key[one], 1.0)
        assert torch.equal(alone[0], random_erasing.erase(normalized, key, 1.0)[row])


def test_erasing_has_timms_distribution():
    count, size = 3000, 32
    blank = torch.full((count, 3, size, size), 100.0)
    ours = (random_erasing.erase(blank, uniform_noise(count, random_erasing.NOISE_DIM), 0.25) != 100).float()
    random.seed(0)
    timms = RandomErasing(0.25, mode="pixel", device="cpu")
    theirs = (timms(blank.clone()) != 100).float()
    for feature in (lambda erased: erased.mean((1, 2, 3)), lambda erased: erased[:, 0].amax(1).sum(1)):
        assert ks_2samp(feature(ours).numpy(), feature(theirs).numpy()).pvalue > 1e-3
    assert torch.equal(ours.amax(1), ours.amin(1))  # all channels, a rectangle
    rows, columns = ours[:, 0].amax(2).sum(1), ours[:, 0].amax(1).sum(1)
    assert torch.equal(rows * columns, ours[:, 0].sum((1, 2)))
    density = ours[:, 0].sum(0) / ours[:, 0].sum()
    assert (density - theirs[:, 0].sum(0) / theirs[:, 0].sum()).abs().max() < 4e-4


def test_erased_pixels_are_independent_normal_numbers():
    key = uniform_noise(50, 2)
    values = random_erasing.hash_normal(key, torch.Size((3, 32, 32)))
    assert kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    assert values.unique().numel() > 0.99 * values.numel()
    neighbors = torch.corrcoef(torch.stack([values[:, :, :, :-1].flatten(), values[:, :, :, 1:].flatten()]))
    between_images = torch.corrcoef(values.flatten(1))
    assert abs(neighbors[0, 1]) < 0.01 and (between_images - torch.eye(50)).abs().max() < 0.1


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("crops", [1, 2])
def test_targets_are_mixed_as_the_pixels(alphas, crops):
    count = 64
    labels = torch.arange(count) // crops  # crops of an image have its class
    targets = torch.nn.functional.one_hot(labels).float()
    images = labels.float()[:, None, None, None].expand(-1, 3, 20, 24)
    noise = uniform_noise(count, mixup.NOISE_DIM)
    mixed, soft = mixup.mixup_cutmix(images, targets, noise, *alphas, crops)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(soft.shape[1]).float())
    torch.testing.assert_close(soft.sum(1), torch.ones(count))
    partner = labels ^ 1
    share_of_pair = soft.gather(1, labels[:, None]) + soft.gather(1, partner[:, None])
    assert ((soft > 0).sum(1) <= 2).all() and (share_of_pair > 0.999).all()
    if not alphas[0]:
        assert ((mixed == images) | (mixed == partner[:, None, None, None].float())).all()
    halves = [
        mixup.mixup_cutmix(*(rows[half] for rows in (images, targets, noise)), *alphas, crops)
        for half in (slice(0, 32), slice(32, None))
    ]
    assert torch.equal(torch.cat([images for images, _ in halves]), mixed)


@pytest.mark.parametrize("alpha", [1.0, 0.8, 0.5])
def test_mixing_share_has_a_beta_distribution(alpha):
    tries = uniform_noise(20_000, 2 * mixup.TRIES)
    share = mixup.draw_beta(tries, torch.full((len(tries), 1), alpha))[:, 0]
    assert kstest(share.numpy(), "beta", (alpha, alpha)).pvalue > 1e-3


def test_cutmix_cuts_timms_box():
    count, height, width = 500, 20, 25
    noise = uniform_noise(count, mixup.NOISE_DIM)
    for row in range(0, count, 2):  # use the centers that timm draws
        np.random.seed(row)
        top, bottom, left, right = rand_bbox((3, height, width), lam=1.0)
        assert (top, left) == (bottom, right)
        noise[row, -2:] = torch.tensor([(top + 0.5) / height, (left + 0.5) / width])
    first = torch.arange(count).remainder(2).eq(0).float()
    images = first[:, None, None, None].expand(-1, 3, height, width)
    mixed, _ = mixup.mixup_cutmix(images, first[:, None], noise, 0.0, 1.0)
    shares = mixup.draw_beta(noise[:, 1 : 1 + 2 * mixup.TRIES], torch.ones(count, 1))[:, 0].numpy()
    for row in range(0, count, 2):
        np.random.seed(row)
        top, bottom, left, right = rand_bbox((3, height, width), shares[row])
        expected = torch.ones(3, height, width)
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(mixed[row], expected) and torch.equal(mixed[row + 1], 1 - expected)


def test_mixed_targets_have_timms_distribution():
    count, size = 4000, 16
    images, labels = torch.zeros(count, 3, size, size), torch.arange(count) % 2
    targets = torch.nn.functional.one_hot(labels).float()
    _, ours = mixup.mixup_cutmix(images, targets, uniform_noise(count, mixup.NOISE_DIM), 0.8, 1.0)
    np.random.seed(0)
    timms = Mixup(0.8, 1.0, mode="pair", label_smoothing=0.0, num_classes=2)
    _, theirs = timms(images, labels)  # its pairs are first and last
    shares = [soft.gather(1, of[:, None])[:, 0] for soft, of in ((ours, torch.arange(count) % 2), (theirs, labels))]
    assert ks_2samp(*(share[::2].numpy() for share in shares)).pvalue > 1e-3
