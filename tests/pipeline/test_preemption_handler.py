"""How a run ends that some rank made stop."""

from itertools import permutations

import pytest

from pipeline.errors import AllRanksError, StoppedEarly, StorageTimeout, UserError
from pipeline.train.preemption import describe_failure, exit_error

MENDED = UserError("a shard is missing")
PASSING = [StorageTimeout("no answer for 30 s"), KeyError("decoder"), RuntimeError("CUDA")]


@pytest.mark.parametrize("errors", [*permutations(PASSING, 1), *permutations(PASSING, 2)])
def test_what_may_pass_ends_with_everything_saved_to_start_again(errors):
    ended = exit_error([describe_failure(error, rank) for rank, error in enumerate(errors)], 12)
    assert isinstance(ended, StoppedEarly)
    assert str(ended).startswith("rank 0: ") and "saved at step 12; the same command continues" in str(ended)


@pytest.mark.parametrize("errors", list(permutations([MENDED, *PASSING[:2]])))
def test_where_one_rank_s_data_must_be_mended_the_run_says_that(errors):
    ended = exit_error([describe_failure(error, rank) for rank, error in enumerate(errors)], 12)
    assert isinstance(ended, AllRanksError)
    assert str(ended) == f"rank {errors.index(MENDED)}: a shard is missing. Everything is saved at step 12"
