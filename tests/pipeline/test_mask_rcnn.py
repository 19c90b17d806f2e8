"""Mask R-CNN: losses per image, pooling, and samples that are a function of the image's key."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import fastrcnn_loss

from pipeline.models import mask_rcnn
from pipeline.models.mask_rcnn import MaskRCNN, RoIPooler
from pipeline.models.stateless_sampling import StatelessSampler, hash_uniform

SIDE, PATCH = 128, 8


def example_target(seed, count):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 80
    boxes = torch.cat([corners, corners + 10 + 30 * torch.rand(count, 2, generator=generator)], dim=1)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.randint(1, 4, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": masks, "size": (SIDE, SIDE)}


def small_model():
    torch.manual_seed(0)
    return MaskRCNN(3, PATCH, width=8, convs=1, fc_width=16, samples=32)


def maps_of(batch):
    sides = [SIDE * 4 // PATCH // 2**level for level in range(5)]
    return [torch.randn(batch, 8, side, side, generator=torch.Generator().manual_seed(side)) for side in sides]


def test_losses_are_means_over_images():
    model, targets, maps = small_model(), [example_target(0, 4), example_target(1, 0), example_target(2, 1)], maps_of(3)
    keys, images = (torch.rand(3, 2) * 2**24).floor() / 2**24, torch.zeros(3, 3, SIDE, SIDE)
    together = model.compute_losses(maps, images, targets, keys)
    alone = [
        model.compute_losses([level[i : i + 1] for level in maps], images[:1], targets[i : i + 1], keys[i : i + 1])
        for i in range(3)
    ]
    assert together.keys() == alone[0].keys() and len(together) == 5
    for name, loss in together.items():
        assert_close(loss, torch.stack([each[name] for each in alone]).mean(), atol=1e-6, rtol=1e-5)
    assert [alone[1][name].item() for name in ("loss_mask", "loss_box", "loss_rpn_box")] == [0, 0, 0]


def test_every_parameter_gets_a_gradient_without_instances():
    model = small_model()
    losses = model.compute_losses(maps_of(1), torch.zeros(1, 3, SIDE, SIDE), [example_target(0, 0)], torch.rand(1, 2))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_classification_loss_is_torchvisions():
    scores, labels = torch.randn(32, 4), torch.randint(0, 4, (32,))
    deltas, box_targets = torch.randn(32, 16), torch.randn(32, 4)
    expected, _ = fastrcnn_loss(scores, deltas, [labels], [box_targets])
    ours = mask_rcnn._box_losses((scores,), (deltas,), [labels], (box_targets,))
    assert_close(ours["loss_class"], expected)
    rows = labels > 0
    chosen = deltas.view(32, 4, 4)[rows, labels[rows]]
    assert_close(ours["loss_box"], (chosen - box_targets[rows]).abs().sum() / 32)


def test_a_perfect_mask_has_no_loss():
    target = example_target(0, 3)
    logits = torch.full((3, 4, 28, 28), -20.0)
    inside = torch.full((28, 28), 20.0)
    for row, label in enumerate(target["labels"].tolist()):
        logits[row, label] = inside
    boxes = target["boxes"].round()  # the masks fill them
    loss = mask_rcnn._mask_loss(logits, boxes, target["labels"], torch.arange(3), target["masks"])
    assert loss.item() < 1e-6
    assert (mask_rcnn._mask_loss(logits, boxes + 20, target["labels"], torch.arange(3), target["masks"])) > 1


@pytest.mark.parametrize(("side", "level"), [(30, 0), (60, 1), (112, 2), (223, 2), (500, 3)])
def test_a_box_is_pooled_at_its_place_and_level(side, level):
    patch, size = 8, 1024
    maps = {}
    for number in range(4):
        stride = patch * 2**number / 4
        centers = (torch.arange(int(size / stride)) + 0.5) * stride
        x, y = centers.expand(len(centers), -1), centers[:, None].expand(-1, len(centers))
        maps[str(number)] = torch.stack([x, y, torch.full_like(x, number)])[None]
    box = torch.tensor([[100.0, 200.0, 100.0 + side, 200.0 + side]])
    pooled = RoIPooler(7, patch)(maps, [box])[0]
    bins = (torch.arange(7) + 0.5) * side / 7
    assert_close(pooled[0], (100 + bins).expand(7, 7), atol=1e-3, rtol=0)
    assert_close(pooled[1], (200 + bins)[:, None].expand(7, 7), atol=1e-3, rtol=0)
    assert (pooled[2] == level).all()


@pytest.mark.parametrize(("positives", "negatives"), [(0, 10), (3, 500), (200, 500), (200, 10)])
def test_sampler_takes_torchvisions_numbers(positives, negatives):
    labels = torch.cat([torch.ones(positives), torch.zeros(negatives), -torch.ones(5)])
    sampler = StatelessSampler(64, 0.25, stream=1)
    sampler.keys = torch.tensor([[0.25, 0.5]])
    ours, theirs = sampler([labels]), BalancedPositiveNegativeSampler(64, 0.25)([labels])
    for (mine,), (other,) in zip(ours, theirs, strict=True):
        assert int(mine.sum()) == int(other.sum())
    assert (labels[ours[0][0]] == 1).all() and (labels[ours[1][0]] == 0).all()


def test_samples_are_uniform_and_depend_on_the_key():
    labels, counts = torch.zeros(100), np.zeros(100)
    sampler = StatelessSampler(20, 0.5, stream=0)
    for number in range(500):
        sampler.keys = torch.tensor([[number / 2**24, 0.75]])
        counts += sampler([labels])[1][0].numpy()
    assert counts.sum() == 500 * 20 and chisquare(counts).pvalue > 1e-3
    numbers = [hash_uniform(torch.tensor(key), 50, stream) for key in ([0.0, 0.5], [0.5, 0.0]) for stream in (0, 1)]
    assert len({tuple(row.tolist()) for row in numbers}) == 4


def test_detections_are_sorted_and_inside_the_image():
    model = small_model()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    model.train()
    (found,) = model.detect(maps_of(1), torch.zeros(1, 3, SIDE, SIDE), [(96, 128)])
    assert model.training and 0 < len(found["boxes"]) <= 100
    assert (found["scores"].diff() <= 0).all() and found["labels"].min() >= 1
    assert found["boxes"].min() >= 0 and (found["boxes"].max(dim=0).values <= torch.tensor([128, 96, 128, 96])).all()
    assert found["masks"].shape[1:] == (1, 28, 28)
