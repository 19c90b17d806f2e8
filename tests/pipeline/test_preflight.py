"""What is in the way of a run is known before it begins, whatever it is."""

import pytest
import torch
import torch.distributed as dist
from http_store import serve
from small_run import SMALL

from pipeline.distributed.launch import DistInfo, init_dist_env
from pipeline.errors import AllRanksError, StoppedEarly
from pipeline.recipe import load_recipe
from pipeline.tasks.pretraining import Pretraining
from pipeline.train import engine
from pipeline.train.preflight import complaint, look, preflight


def task(*overrides):
    return Pretraining(load_recipe("vitb16_mae", [*SMALL, "engine.precision=fp32", *overrides]))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("batch", "micro_batch"), [(12, 4), (15, 5), (16, 4)])
def test_a_batch_that_the_ranks_cannot_share_is_a_fault_and_no_other_decodes(
    shards, tmp_path, size, batch, micro_batch
):
    dist_info = DistInfo(0, size, 0, size, torch.device("cpu"), 1)
    sets = f"data.global_batch={batch}", f"engine.micro_batch={micro_batch}"
    found = look(lambda: task(*sets), [str(shards)], tmp_path / "run", None, dist_info)
    possible = batch % (micro_batch * size) == 0
    assert [str(fault).partition(":")[0] for fault in found.faults] == ["data.global_batch"] * (not possible)
    assert ("decode" in found.texts) == possible


def test_a_wrong_recipe_is_a_finding_like_others(shards, tmp_path):
    dist_info = DistInfo(1, 2, 1, 2, torch.device("cpu"), 1)
    found = look(lambda: load_recipe("typo"), [str(shards)], tmp_path / "run", None, dist_info)
    (fault,) = found.faults
    assert "recipe 'typo'" in str(fault) and found.node and not found.texts


def test_what_the_system_says_of_a_path_is_a_finding_like_others(shards, tmp_path):
    dist_info = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
    found = look(task, [str(shards)], tmp_path / ("r" * 300), None, dist_info)
    (fault,) = found.faults
    assert "File name too long" in str(fault) and set(found.texts) == {"batch", "precision", "data"}


@pytest.fixture
def launcher(monkeypatch):
    """Sets what a launcher would; afterwards nothing that this process adds to it is left."""

    def launch(**said):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in said.items():
            monkeypatch.setenv(name, value)

    return launch


def test_preflight_parts_from_the_others_whatever_it_finds(launcher, tmp_path):
    launcher()
    with pytest.raises(AllRanksError, match="recipe 'typo'"):
        preflight(lambda: load_recipe("typo"), [], tmp_path / "run")
    assert not dist.is_initialized()


def test_ranks_that_do_not_come_are_waited_for_as_long_as_was_said(launcher):
    launcher()
    init_dist_env()
    launcher(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with pytest.raises(
        StoppedEarly, match=r"the ranks cannot meet at 127.0.0.1:0: .*1/2 clients joined\. If"
    ):
        engine.init_distributed(1 / 60, watched=False)


def test_storage_that_does_not_answer_stops_a_new_run_and_lets_one_with_checkpoints_try_again(
    shards, tmp_path
):
    dist_info = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
    with serve(shards) as server:
        server.only("manifest.json", "stall")
        sets = "data.timeout_s=0.2", "data.retries=0"
        away = look(lambda: task(*sets), [server.url], tmp_path / "run", None, dist_info)
        wrong = look(
            lambda: task(*sets, "data.global_batch=7"), [server.url], tmp_path / "run", None, dist_info
        )
    assert f"{server.url}/manifest.json: cannot be read" in str(complaint([away], begun=True))
    assert isinstance(complaint([away, away], begun=True), StoppedEarly)
    assert isinstance(complaint([away, away], begun=False), AllRanksError)
    assert isinstance(complaint([away, wrong], begun=True), AllRanksError)
