"""ZeRO 1 in bf16 accumulates gradients with few operations and DeepSpeed's bits."""

import re

from runs import run_module


def test_foreach_accumulation_has_deepspeeds_bits():
    output = run_module("foreach_accumulation", ranks=2)
    counts = re.findall(r"(accumulation|norm) (\d+) -> (\d+)", output)
    assert len(counts) == 4
    assert all(int(after) * 5 < int(before) for _, before, after in counts), output
