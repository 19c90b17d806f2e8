"""Everything that surrounds the steps of a training command.

Invariant: on exit the process group, the watchdog and the lock of the run directory are closed in this order, so that
the watchdog ends a rank that hangs in the end, and every rank raises the same error if the ranks agreed on one.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from types import TracebackType

from pipeline.distributed.abort import AbortChannel
from pipeline.distributed.collectives import destroy_process_group_on_exit, raise_on_all_ranks
from pipeline.distributed.launch import DistInfo, init_dist_env, wait_for_rank_0
from pipeline.recipe.linear_probe import ProbeRecipe
from pipeline.recipe.training import TrainingRecipe
from pipeline.train.preemption import PreemptionHandler
from pipeline.train.run_directory import RunDirectory
from pipeline.train.watchdog import Watchdog


class RunSession:
    """Signal handlers, process group, lock of the run directory, and watchdog of one training command.

    Args:
        run: The run directory. Nothing is written to it before `acquire_run_dir`.
        timeout_minutes: The recipe's engine.timeout_minutes.
        connect: Creates the process group.

    Attributes:
        dist_info: This process among all; set on enter.
        preemption: Stop requests; set on enter.
        abort: Ends all ranks because of an error of one; set on enter.
        watchdog: Set by `acquire_run_dir`.
    """

    dist_info: DistInfo
    preemption: PreemptionHandler
    abort: AbortChannel
    watchdog: Watchdog

    def __init__(self, run: RunDirectory, timeout_minutes: float, connect: Callable[[DistInfo], None]):
        self.run, self._timeout_minutes, self._connect = run, timeout_minutes, connect
        self._resources = ExitStack()
        self._stack = ExitStack()

    def __enter__(self) -> "RunSession":
        self.preemption = PreemptionHandler()
        self.dist_info = init_dist_env()
        with ExitStack() as stack:
            stack.enter_context(self._resources)
            stack.enter_context(destroy_process_group_on_exit())
            wait_for_rank_0(self.dist_info.rank, 60 * self._timeout_minutes, self.preemption.raise_if_requested)
            self._connect(self.dist_info)
            self.abort = stack.enter_context(closing(AbortChannel(self.dist_info)))
            self.preemption.connect(self._timeout_minutes)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)

    @property
    def is_rank_0(self) -> bool:
        return self.dist_info.rank == 0

    def acquire_run_dir(self, recipe: TrainingRecipe | ProbeRecipe) -> None:
        """Lock the run directory and start the watchdog. Collective.

        Args:
            recipe: The recipe, with everything filled in that preparation found out.

        Raises:
            AllRanksError: If the directory is not a run of this recipe, or another job uses it.
        """
        enter = self._resources.enter_context
        raise_on_all_ranks(lambda: enter(self.run.lock(recipe)) if self.is_rank_0 else None)
        timeout_s = 60 * self._timeout_minutes
        self.watchdog = raise_on_all_ranks(lambda: enter(closing(Watchdog(self.run, self.dist_info.rank, timeout_s))))

    def on_rank_0(self, function: Callable[[], object]) -> None:
        """Run a function that writes files on rank 0; if it fails, raise on all ranks. Collective."""
        raise_on_all_ranks(lambda: function() if self.is_rank_0 else None)
