from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.data.pixels import single_threaded


def test_single_threaded_affects_only_its_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2, initializer=single_threaded) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1, 1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
