from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.data.pixels import limit_torch_to_calling_thread


def test_single_threaded_affects_only_its_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2, initializer=limit_torch_to_calling_thread) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1, 1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
