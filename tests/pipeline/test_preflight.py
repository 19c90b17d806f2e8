"""Preflight reports every problem that would stop a run, and writes nothing."""

import pytest
import torch
import torch.distributed as dist
from http_store import serve
from small_run import SINGLE_PROCESS, SMALL

from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.errors import AllRanksError, StoppedEarly, StorageTimeout
from pipeline.recipe import load_recipe
from pipeline.tasks.pretraining import Pretraining
from pipeline.train import engine
from pipeline.train.preflight import combine_errors, preflight, run_checks
from pipeline.train.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def make_task(*overrides):
    return Pretraining(load_recipe("vitb16_mae", [*SMALL, "engine.precision=fp32", *overrides]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("batch", "micro_batch"), [(12, 4), (15, 5), (16, 4)])
def test_batch_must_divide_and_valid_ones_are_decoded(shards, run, world_size, batch, micro_batch):
    dist_info = DistInfo(0, world_size, 0, world_size, torch.device("cpu"), 1)
    overrides = f"data.global_batch={batch}", f"engine.micro_batch={micro_batch}"
    findings = run_checks(lambda: make_task(*overrides), [str(shards)], run, None, dist_info, min_decode_s=0)
    valid = batch % (micro_batch * world_size) == 0
    assert [str(error).partition(":")[0] for error in findings.errors] == ["data.global_batch"] * (not valid)
    assert ("decode" in findings.texts) == valid
    assert not run.path.exists()


def test_invalid_recipe_is_reported(shards, run):
    dist_info = DistInfo(1, 2, 1, 2, torch.device("cpu"), 1)
    findings = run_checks(lambda: load_recipe("typo"), [str(shards)], run, None, dist_info)
    (error,) = findings.errors
    assert "recipe 'typo'" in str(error) and findings.node and not findings.texts


def test_os_error_is_reported(shards, tmp_path):
    run = RunDirectory(tmp_path / ("r" * 300))
    findings = run_checks(make_task, [str(shards)], run, None, SINGLE_PROCESS)
    (error,) = findings.errors
    assert "File name too long" in str(error) and set(findings.texts) == {"batch", "precision", "data"}


@pytest.fixture
def launcher(monkeypatch):
    """A function that sets a launcher's variables. All variables are restored after the test."""

    def launch(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_failed_preflight_destroys_the_process_group(launcher, run):
    launcher()
    with pytest.raises(AllRanksError, match="recipe 'typo'"):
        preflight(lambda: load_recipe("typo"), [], run)
    assert not dist.is_initialized()


def test_missing_rank_is_a_rendezvous_error_after_timeout(launcher):
    launcher()
    init_dist_env()
    launcher(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with pytest.raises(StoppedEarly, match=r"127.0.0.1:0: .*1/2 clients joined"):
        engine.init_distributed(1 / 60, with_watchdog=False)


def test_storage_timeout_is_retried_only_with_checkpoints(shards, run):
    overrides = "data.timeout_s=0.2", "data.retries=0"
    with serve(shards) as server:
        server.fail("manifest.json", "stall")
        stalled, invalid = (
            run_checks(lambda more=more: make_task(*overrides, *more), [server.url], run, None, SINGLE_PROCESS)
            for more in ([], ["data.global_batch=7", "engine.micro_batch=2"])
        )
    assert all(isinstance(error, StorageTimeout) for error in stalled.errors)
    assert f"{server.url}/manifest.json: " in str(combine_errors([stalled], has_checkpoints=True))
    assert isinstance(combine_errors([stalled, stalled], has_checkpoints=True), StoppedEarly)
    assert isinstance(combine_errors([stalled, stalled], has_checkpoints=False), AllRanksError)
    assert isinstance(combine_errors([stalled, invalid], has_checkpoints=True), AllRanksError)
