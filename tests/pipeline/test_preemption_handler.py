"""The failures of all ranks decide whether a run ends with a user error or can simply be resumed."""

from itertools import permutations

import pytest

from pipeline.errors import AllRanksError, StoppedEarly, StorageTimeout, UserError
from pipeline.train.preemption import describe_failure, exit_error

USER_ERROR = UserError("a shard is missing")
TRANSIENT = [StorageTimeout("no response for 30 s"), KeyError("decoder"), RuntimeError("CUDA")]


@pytest.mark.parametrize("errors", [*permutations(TRANSIENT, 1), *permutations(TRANSIENT, 2)])
def test_transient_failures_stop_early(errors):
    error = exit_error([describe_failure(error, rank) for rank, error in enumerate(errors)], 12)
    assert isinstance(error, StoppedEarly)
    assert str(error).startswith("rank 0: ") and "saved at step 12" in str(error)


@pytest.mark.parametrize("errors", list(permutations([USER_ERROR, *TRANSIENT[:2]])))
def test_user_error_of_one_rank_is_reported(errors):
    error = exit_error([describe_failure(error, rank) for rank, error in enumerate(errors)], 12)
    assert isinstance(error, AllRanksError)
    assert str(error) == f"rank {errors.index(USER_ERROR)}: a shard is missing; saved at step 12"


def test_failure_before_the_first_checkpoint_is_reported_so():
    error = exit_error([describe_failure(USER_ERROR, 0)], 0)
    assert isinstance(error, AllRanksError) and "nothing was trained" in str(error)
