"""Augmentations on tensors: Pillow's and timm's pixels, the papers' laws."""

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
"""Of Python's generator, for a first number below and above a half."""


def numbers(count: int, width: int, epoch: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniform(0, Purpose.MASK, epoch, np.arange(count), width))


@pytest.fixture(scope="module")
def pictures(photographs) -> list[Image.Image]:
    """Photographs of 64 x 48 px, and flat ones."""
    paths = sorted(p for p in photographs.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:10]
    found = [Image.open(path).convert("RGB").resize((64, 48)) for path in paths]
    return [*found, Image.new("RGB", (64, 48), (7, 7, 7)), Image.new("RGB", (64, 48), (255, 0, 128))]


def as_levels(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures]).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.0, 0.37, 0.9, 0.99])
def test_an_operation_gives_timms_pixels(pictures, name, sign, strength):
    op = auto_augment.AugmentOp(
        TIMMS[name],
        prob=1.0,
        magnitude=10 * strength,
        hparams={
            "img_mean": tuple(int(value) for value in FILL),
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    theirs = []
    for picture in pictures:
        random.seed(SEEDS[sign])  # the sign is all that timm draws here
        theirs.append(op(picture))
    theirs = as_levels(theirs)
    count = len(pictures)
    operation = torch.full((count,), rand_augment.OPERATIONS.index(name))
    strengths, signs = torch.full((count,), strength), torch.full((count,), float(sign))
    ours = rand_augment.apply(as_levels(pictures), operation, strengths, signs, FILL)
    assert (ours == ours.floor()).all() and ours.min() >= 0 and ours.max() <= 255
    different = (ours - theirs).abs()
    assert different.max() <= 1 and different.mean() < 0.02


def test_rand_augment_leaves_a_quarter_of_the_images_as_they_are_and_draws_all_operations_alike(pictures):
    levels = as_levels(pictures[:1]).expand(400, -1, -1, -1)
    drawn = numbers(400, rand_augment.NOISE_DIM)
    ours = rand_augment.rand_augment(levels, drawn, 9.0, 0.5, FILL)
    untouched = ((ours - levels).abs().amax((1, 2, 3)) == 0).float().mean().item()
    assert 0.17 < untouched < 0.36  # one half of one half, and a few that change nothing here
    many = (numbers(20_000, rand_augment.NOISE_DIM)[:, :: rand_augment.NOISE_PER_LAYER] * 15).long().flatten()
    shares = torch.bincount(many).double() / len(many)
    assert len(shares) == 15 and (shares - 1 / 15).abs().max() < 0.005


def test_what_happens_to_an_image_follows_from_its_own_numbers_alone(pictures):
    levels, drawn = as_levels(pictures), numbers(len(pictures), rand_augment.NOISE_DIM)
    erased, key = (levels - 128) / 64, numbers(len(pictures), random_erasing.NOISE_DIM, 1)
    for at in range(len(pictures)):
        alone = rand_augment.rand_augment(levels[at : at + 1], drawn[at : at + 1], 9.0, 0.5, FILL)
        assert torch.equal(alone[0], rand_augment.rand_augment(levels, drawn, 9.0, 0.5, FILL)[at])
        alone = random_erasing.erase(erased[at : at + 1], key[at : at + 1], 1.0)
        assert torch.equal(alone[0], random_erasing.erase(erased, key, 1.0)[at])


def test_erasing_has_timms_law():
    count, size = 3000, 32
    blank = torch.full((count, 3, size, size), 100.0)
    ours = (random_erasing.erase(blank, numbers(count, random_erasing.NOISE_DIM), 0.25) != 100).float()
    random.seed(0)
    timms = RandomErasing(0.25, mode="pixel", device="cpu")
    theirs = (timms(blank.clone()) != 100).float()
    for law in (lambda erased: erased.mean((1, 2, 3)), lambda erased: erased[:, 0].amax(1).sum(1)):
        assert ks_2samp(law(ours).numpy(), law(theirs).numpy()).pvalue > 1e-3
    assert torch.equal(ours.amax(1), ours.amin(1))  # all channels, a rectangle
    rows, columns = ours[:, 0].amax(2).sum(1), ours[:, 0].amax(1).sum(1)
    assert torch.equal(rows * columns, ours[:, 0].sum((1, 2)))
    where = ours[:, 0].sum(0) / ours[:, 0].sum()
    assert (where - theirs[:, 0].sum(0) / theirs[:, 0].sum()).abs().max() < 4e-4


def test_erased_pixels_are_normal_and_different_everywhere():
    key = numbers(50, 2)
    values = random_erasing.normal(key, torch.Size((3, 32, 32)))
    assert kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    assert values.unique().numel() > 0.99 * values.numel()
    neighbours = torch.corrcoef(torch.stack([values[:, :, :, :-1].flatten(), values[:, :, :, 1:].flatten()]))
    images = torch.corrcoef(values.flatten(1))
    assert abs(neighbours[0, 1]) < 0.01 and (images - torch.eye(50)).abs().max() < 0.1


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("crops", [1, 2])
def test_targets_are_mixed_as_the_pixels_are(mixup, cutmix, crops):
    count = 64
    labels = torch.arange(count) // crops  # crops of an image have its class
    targets = torch.nn.functional.one_hot(labels).float()
    images = labels.float()[:, None, None, None].expand(-1, 3, 20, 24)
    drawn = numbers(count, mixup.NOISE_DIM)
    mixed, soft = mixup.mixup_cutmix(images, targets, drawn, mixup, cutmix, crops)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(soft.shape[1]).float())
    torch.testing.assert_close(soft.sum(1), torch.ones(count))
    partner = labels ^ 1
    assert ((soft > 0).sum(1) <= 2).all() and (
        soft.gather(1, labels[:, None]) + soft.gather(1, partner[:, None]) > 0.999
    ).all()
    if not mixup:
        whole = (mixed == images) | (mixed == partner[:, None, None, None].float())
        assert whole.all()
    half = [
        mixup.mixup_cutmix(*(rows[at] for rows in (images, targets, drawn)), mixup, cutmix, crops)
        for at in (slice(0, 32), slice(32, None))
    ]
    assert torch.equal(torch.cat([images for images, _ in half]), mixed)


@pytest.mark.parametrize("alpha", [1.0, 0.8, 0.5])
def test_the_share_is_drawn_from_beta(alpha):
    tries = numbers(20_000, 2 * mixup.TRIES)
    share = mixup.beta(tries, torch.full((len(tries), 1), alpha))[:, 0]
    assert kstest(share.numpy(), "beta", (alpha, alpha)).pvalue > 1e-3


def test_cutmix_cuts_timms_box():
    count, height, width = 500, 20, 25
    drawn = numbers(count, mixup.NOISE_DIM)
    for at in range(0, count, 2):  # our centres are those that timm draws
        np.random.seed(at)
        top, bottom, left, right = rand_bbox((3, height, width), lam=1.0)
        assert (top, left) == (bottom, right)
        drawn[at, -2:] = torch.tensor([(top + 0.5) / height, (left + 0.5) / width])
    first = torch.arange(count).remainder(2).eq(0).float()
    images = first[:, None, None, None].expand(-1, 3, height, width)
    mixed, _ = mixup.mixup_cutmix(images, first[:, None], drawn, 0.0, 1.0)
    shares = mixup.beta(drawn[:, 1 : 1 + 2 * mixup.TRIES], torch.ones(count, 1))[:, 0].numpy()
    for at in range(0, count, 2):
        np.random.seed(at)
        top, bottom, left, right = rand_bbox((3, height, width), shares[at])
        expected = torch.ones(3, height, width)
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(mixed[at], expected) and torch.equal(mixed[at + 1], 1 - expected)


def test_mixed_targets_have_timms_law():
    count, size = 4000, 16
    images, labels = torch.zeros(count, 3, size, size), torch.arange(count) % 2
    targets = torch.nn.functional.one_hot(labels).float()
    _, ours = mixup.mixup_cutmix(images, targets, numbers(count, mixup.NOISE_DIM), 0.8, 1.0)
    np.random.seed(0)
    timms = Mixup(0.8, 1.0, mode="pair", label_smoothing=0.0, num_classes=2)
    _, theirs = timms(images, labels)  # its pairs are first and last
    shares = [
        soft.gather(1, of[:, None])[:, 0] for soft, of in ((ours, torch.arange(count) % 2), (theirs, labels))
    ]
    assert ks_2samp(*(share[::2].numpy() for share in shares)).pvalue > 1e-3
