"""Batch normalization over two ranks equals that of one process with both ranks' images."""

import json

from runs import run_module


def test_two_ranks_normalize_as_one_process():
    for differences in json.loads(run_module("ranks_of_batch_norm", ranks=2)):
        assert len(differences) == 5 and max(differences.values()) < 5e-6, differences
