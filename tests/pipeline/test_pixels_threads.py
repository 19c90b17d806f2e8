from concurrent.futures import ThreadPoolExecutor

import torch

from pipeline.data.pixels import one_thread


def test_a_decoding_thread_keeps_to_itself_and_leaves_the_others_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2, initializer=one_thread) as pool:
            assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1, 1, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
