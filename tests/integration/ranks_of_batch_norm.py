"""Print the largest relative differences between batch normalization on all ranks together and on one process."""

import json

import torch
import torch.distributed as dist
from torch import nn

from pipeline.distributed.collectives import init_distributed
from pipeline.distributed.sync_batch_norm import SyncBatchNorm2d

with init_distributed(timeout_minutes=1) as dist_info:
    torch.manual_seed(0)
    images, weights = torch.randn(2, 4, 3, 5, 5) * 2 + 3
    theirs, ours = nn.BatchNorm2d(3), SyncBatchNorm2d(3)
    nn.init.normal_(theirs.weight)
    ours.weight.data.copy_(theirs.weight.data)
    share = slice(2 * dist_info.rank, 2 * dist_info.rank + 2)
    whole, part = images.clone().requires_grad_(), images[share].clone().requires_grad_()
    expected = theirs(whole)
    output = ours(part)
    (expected * weights).sum().backward()
    (output * weights[share]).sum().backward()
    ours.update_running_statistics(torch.tensor(0.0))
    gradient = ours.weight.grad.clone()
    dist.all_reduce(gradient)
    pairs = {
        "output": (output, expected[share]),
        "gradient": (part.grad, whole.grad[share]),
        "gradient of the weight": (gradient, theirs.weight.grad),
        "running mean": (ours.running_mean, theirs.running_mean),
        "running variance": (ours.running_var, theirs.running_var),
    }
    differences = {
        name: float(((mine - other).abs().max() / other.abs().max()).detach()) for name, (mine, other) in pairs.items()
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, differences)
    if dist_info.rank == 0:
        print(json.dumps(everyone))
