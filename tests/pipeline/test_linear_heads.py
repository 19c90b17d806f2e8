"""The probe's heads: updated as by MAE's LARS, independent of each other, converging to scikit-learn's."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from pipeline.evals.linear_heads import LinearHeads
from pipeline.train.lr_schedule import learning_rate

WIDTH, CLASSES = 16, 5


def gaussian_clusters(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw overlapping clusters of points, one per class."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    return 3 + 2 * centers[labels] + 3 * torch.randn(samples, WIDTH, generator=generator), labels


def official_lars(parameters: list[nn.Parameter], momenta: list[torch.Tensor], rate: float) -> None:
    """Update as util/lars.py of facebookresearch/mae does without weight decay."""
    for p, mu in zip(parameters, momenta, strict=True):
        dp = p.grad
        if p.ndim > 1:
            param_norm, update_norm = torch.norm(p), torch.norm(dp)
            one = torch.ones_like(param_norm)
            q = torch.where(param_norm > 0.0, torch.where(update_norm > 0, 0.001 * param_norm / update_norm, one), one)
            dp = dp.mul(q)
        mu.mul_(0.9).add_(dp)
        p.data.add_(mu, alpha=-rate)


@pytest.mark.parametrize("rates", [(0.5,), (0.1, 0.5, 4.0)])
def test_each_head_trains_as_mae_probe_at_its_rate(rates):
    torch.manual_seed(0)
    heads = LinearHeads(rates, CLASSES, WIDTH)
    head = rates.index(0.5)
    peer = nn.Sequential(nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6), nn.Linear(WIDTH, CLASSES))
    peer[1].weight.data.copy_(heads.weight[head])
    peer[1].bias.data.zero_()
    parameters = list(peer.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in range(30):
        features, labels = gaussian_clusters(64, step)
        losses = heads.train_step(features, labels, rate=3.0 - 0.1 * step)
        peer.zero_grad()
        loss = F.cross_entropy(peer(features), labels)
        loss.backward()
        official_lars(parameters, momenta, 0.5 * (3.0 - 0.1 * step))
        assert losses[head].item() == pytest.approx(loss.item(), rel=1e-5)
    features, _ = gaussian_clusters(50, 99)
    assert torch.allclose(heads.eval()(features, head), peer.eval()(features), atol=1e-5)


def test_head_converges_to_scikit_learns_logistic_regression():
    (features, labels), (val_features, val_labels) = gaussian_clusters(2000, 1), gaussian_clusters(2000, 2)
    torch.manual_seed(0)
    heads = LinearHeads((30.0,), CLASSES, WIDTH)
    for step in range(2000):
        heads.train_step(features, labels, learning_rate(step, 2000, 100, 1.0))
    scaler = StandardScaler().fit(features.numpy())
    reference = LogisticRegression(C=1e6, max_iter=2000).fit(scaler.transform(features.numpy()), labels.numpy())
    expected = reference.predict(scaler.transform(val_features.numpy()))
    predicted = heads.eval()(val_features, 0).argmax(1).numpy()
    assert (predicted == expected).mean() > 0.99
    accuracies = [(classes == val_labels.numpy()).mean() for classes in (predicted, expected)]
    assert abs(accuracies[0] - accuracies[1]) < 0.005
