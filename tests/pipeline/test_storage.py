"""What happens when the storage does not behave: every time the promised thing, within a bound."""

import hashlib
import os
import re
import shutil
import threading
import time
from itertools import islice

import fsspec
import numpy as np
import pytest
from http_store import serve
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shard_file import ShardWriter
from data_prep.shard_set import Manifest, Shard, read_manifest, shard_name, tar_path, write_manifest
from pipeline.data.read_ahead import ReadAhead
from pipeline.data.reader import ShardReader
from pipeline.data.retry import Cancelled, RateLimitedWarnings, retry_with_timeout
from pipeline.data.storage import LARGEST_READ, coalesced
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection, RetryPolicy

SLACK = 15.0  # seconds of a busy machine; what hangs would hang for longer
PATIENCE = RetryPolicy(1.0, 2, 0.1)


@pytest.fixture
def store(shards):
    with serve(shards) as server:
        yield server


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "set")


def reader_of(place, kind=ShardReader, **settings):
    """One that is soon out of patience: after `PATIENCE.bound` seconds, where the settings say no other."""
    given = {
        "timeout_s": PATIENCE.timeout_s,
        "retries": PATIENCE.retries,
        "shuffle_window_shards": 2,
        **settings,
    }
    return kind(place, DataSection(**given), first_wait_s=PATIENCE.first_wait_s)


def batches_of(reader, size=10):
    stream, start = reader.stream(0), 0
    while True:
        yield stream.locate(np.arange(start, start + size))
        start += size


def read_ahead(reader, size=10, limit=10**6):
    return ReadAhead(reader, batches_of(reader, size), 3, limit)


def epoch_of(reader):
    """Every sample's bytes, by its identity."""
    ahead = read_ahead(reader)
    found = {}
    while len(found) < reader.num_samples:
        locations, images = next(ahead)
        found.update(zip(locations.sample.tolist(), (image.tobytes() for image in images), strict=True))
    ahead.close()
    return found


def failure_of(reader):
    """What reading an epoch raises, and after how many seconds; then closes, which must not hang either."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        epoch_of(reader)
    took = time.monotonic() - began
    assert "\n" not in str(caught.value)
    return str(caught.value), took


# ---- Local and remote are the same


def test_a_set_behind_a_url_is_read_as_the_one_on_the_disk(shards, store):
    assert epoch_of(reader_of(store.url)) == epoch_of(reader_of(shards))


def test_any_file_system_of_fsspec_will_do(shards):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        if path.is_file():
            memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    try:
        assert epoch_of(reader_of("memory://set")) == epoch_of(reader_of(shards))
    finally:
        memory.rm("/set", recursive=True)


@pytest.mark.parametrize(
    "place",
    ["nosuchthing://set", "http://127.0.0.1:1/set", "http://[::1/set", "http://host:port/set", "https://"],
)
def test_a_url_that_cannot_be_opened_is_named_at_once(place):
    with pytest.raises(UserError, match=re.escape(place)):
        reader_of(place)


def test_a_url_without_a_set_is_named(store):
    store.directory = store.directory.parent
    with pytest.raises(UserError, match=r"/set/manifest.json: is missing"):
        reader_of(store.url)


def test_a_set_that_must_not_be_read_is_named_at_once(store):
    store.fault = lambda name: "forbidden"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"/set/manifest.json: must not be read: the server says 403"):
        reader_of(store.url, timeout_s=30.0, retries=5)
    assert time.monotonic() - began < SLACK


def test_a_password_in_a_url_is_shown_to_nobody(store):
    with pytest.raises(UserError) as caught:
        reader_of("http://user:secret@127.0.0.1:1/set", retries=0)
    assert "secret" not in str(caught.value)


# ---- Faults of a server


@pytest.mark.parametrize("fault", ["stall", "cut", "error"])
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_fault_that_passes_costs_nothing_but_time(shards, store, fault, suffix, capfd):
    store.only(suffix, fault, times=2)
    reader = reader_of(store.url)
    began = time.monotonic()
    assert epoch_of(reader) == epoch_of(reader_of(shards))
    assert time.monotonic() - began < PATIENCE.bound + SLACK
    warning = capfd.readouterr().err
    assert (
        warning.startswith(f"warning: {store.url}/") and f"{suffix}: " in warning and "try 2 of 3" in warning
    )


def test_a_server_that_sends_less_than_it_was_asked_for_is_asked_again(shards, store, capfd):
    store.only(".tar", "short", times=2)
    assert epoch_of(reader_of(store.url)) == epoch_of(reader_of(shards))
    assert "bytes came instead of" in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["stall", "cut", "error"])
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_fault_that_stays_ends_in_one_line_that_names_the_file(store, fault, suffix):
    store.only(suffix, fault)
    message, took = failure_of(reader_of(store.url))
    assert message.startswith(f"{store.url}/") and f"{suffix}: cannot be read (tries: 3): " in message
    assert took < PATIENCE.bound + SLACK


def test_a_server_without_ranges_is_named(store):
    store.only(".tar", "whole")
    message, _ = failure_of(reader_of(store.url))
    assert "range requests" in message


def test_batches_before_the_fault_are_delivered_and_the_failure_is_known_in_advance(store):
    reader = reader_of(store.url, shuffle_window_shards=1)
    last = reader.stream(0).plan(0).shards[-1]
    store.only(reader.name(int(last)).rsplit("/", 1)[1], "error")
    size = int(reader.shard_sizes[0])
    ahead = read_ahead(reader, size, limit=10**9)
    whole = (reader.num_samples - int(reader.shard_sizes[last])) // size
    taken = 0  # what is read ahead doubles with every batch taken; by the last whole one it reaches the fault
    while ahead.failure is None and taken < whole:
        next(ahead)
        taken += 1
        time.sleep(0.1)
    deadline = time.monotonic() + 60
    while ahead.failure is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(whole - taken):
        next(ahead)
    with pytest.raises(UserError) as caught:
        list(islice(ahead, 2))
    assert caught.value is ahead.failure
    ahead.close()


def test_closing_ends_a_wait_that_nothing_else_would(store):
    store.only(".tar", "stall")
    ahead = read_ahead(reader_of(store.url, timeout_s=1000.0))
    threading.Timer(0.3, ahead.close).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        next(ahead)
    assert time.monotonic() - began < SLACK


# ---- Shards that change under a running job


def changed_while_running(copied, change):
    """Read a batch, change the shard that is being read, read on; everything is read once, so none is
    cached."""
    reader = reader_of(copied, shuffle_window_shards=1)
    first = int(reader.stream(0).plan(0).shards[0])
    reader.read(first, 0)
    change(copied / f"{reader.manifest.shards[first].name}.tar")
    return reader


def test_a_shard_that_is_deleted_while_it_is_read_is_read_to_its_end(copied, shards):
    reader = changed_while_running(copied, os.unlink)
    assert epoch_of(reader) == epoch_of(reader_of(shards))


def test_a_shard_that_is_deleted_before_it_is_opened_is_named(copied):
    reader = reader_of(copied)
    name = reader.manifest.shards[2].name
    (copied / f"{name}.tar").unlink()
    message, took = failure_of(reader)
    assert f"{name}.tar: is missing" in message and took < SLACK


def test_a_local_read_that_hangs_is_given_up(copied):
    """As on a dead NFS server; here a pipe that nobody writes to."""
    reader = reader_of(copied)
    path = tar_path(copied, reader.manifest.shards[2])
    path.unlink()
    os.mkfifo(path)
    message, took = failure_of(reader)
    assert f"{path.name}: cannot be read (tries: 3): no answer for 1 s" in message
    assert took < PATIENCE.bound + SLACK
    os.close(os.open(path, os.O_RDWR))  # lets the threads go that hang in there


def test_a_shard_that_is_truncated_is_named(copied):
    reader = changed_while_running(copied, lambda path: os.truncate(path, path.stat().st_size // 2))
    message, took = failure_of(reader)
    assert ".tar: ends at byte " in message and "truncated" in message and took < SLACK


@pytest.mark.parametrize("how", ["in place", "by name"])
def test_a_shard_that_is_replaced_by_another_is_named(copied, other_shards, how):
    def replace(path):
        other = tar_path(other_shards, read_manifest(other_shards).shards[0])
        if how == "in place":
            path.write_bytes(other.read_bytes().ljust(path.stat().st_size, b"\0")[: path.stat().st_size])
        else:
            shutil.copy(other, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)

    if how == "in place":
        reader = changed_while_running(copied, replace)
    else:
        reader = reader_of(copied)
        replace(tar_path(copied, reader.manifest.shards[1]))
    message, took = failure_of(reader)
    assert "no longer holds sample" in message or "truncated" in message
    assert took < SLACK


# ---- Reading ahead


@pytest.fixture
def even_shards(tmp_path):
    """A set whose samples all have `EVEN` bytes."""
    shards = []
    for number in range(6):
        name = shard_name("even", "train", number)
        with open(tmp_path / f"{name}.tar", "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for index in range(20):
                writer.add(f"{number}_{index}", [("jpg", bytes([number, index]) * (EVEN // 2))])
            digest, data = writer.finish()
        (tmp_path / f"{name}.idx").write_bytes(data)
        shards.append(Shard(name, 20, writer.bytes, digest, len(data), hashlib.sha256(data).hexdigest()))
    manifest = Manifest(1, "even", "train", 0, {}, "0" * 64, 120, 0, {}, (), (), tuple(shards))
    write_manifest(tmp_path, manifest)
    return tmp_path


EVEN = 100_000


@pytest.mark.parametrize("batches", [0.1, 3.3, 4.5, 1000])
def test_batches_come_in_order_whatever_the_limit_and_memory_stays_under_it(even_shards, batches):
    reader = reader_of(even_shards)
    expected = list(islice(batches_of(reader), 30))
    batch = 10 * reader.mean_bytes(0)
    ahead = read_ahead(reader, limit=int(batches * batch))
    largest = 0
    for locations in expected:
        found, images = next(ahead)
        assert found.sample.tolist() == locations.sample.tolist()
        for shard, index, image in zip(locations.shard, locations.index, images, strict=True):
            assert image.tobytes() == bytes([shard, index]) * (EVEN // 2)
        largest = max(largest, ahead.held_bytes + 10 * EVEN)  # when this batch was still held
    ahead.close()
    assert largest <= max(batches, 1) * batch
    assert largest >= min(batches - 1, 30) * EVEN  # and is made use of


@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(1, 10**6)), max_size=30), st.booleans())
def test_neighbours_are_read_together_and_nothing_is_lost(pieces, ascending):
    pieces = sorted(pieces) if ascending else pieces
    spans, rows = coalesced([start for start, _ in pieces], [sum(piece) for piece in pieces], gap=1000)
    assert len(rows) == len(pieces)
    for (start, size), row in zip(pieces, rows, strict=True):
        offset, length = spans[row]
        assert offset <= start and start + size <= offset + length <= offset + LARGEST_READ
    read = sum(length for _, length in spans)
    assert read <= sum(size for _, size in pieces) + 1000 * len(pieces)


class Watched(ShardReader):
    """Notes what it is asked for."""

    def __init__(self, *what, **how):
        self.asked = []
        super().__init__(*what, **how)

    def read_many(self, shard, indexes):
        self.asked.append((shard, list(indexes)))
        return super().read_many(shard, indexes)


def test_a_piece_reads_each_shard_front_to_back(shards):
    reader = reader_of(shards, Watched)
    ahead = ReadAhead(reader, batches_of(reader), 1, 10**9)
    for _ in range(2 * reader.num_samples // 10):
        next(ahead)
    ahead.close()
    assert all(indexes == sorted(indexes) for _, indexes in reader.asked)
    assert max(len(indexes) for _, indexes in reader.asked) > 10  # more than a micro batch has of a shard


def test_a_programming_error_in_a_try_is_not_tried_again():
    tries = []

    def attempt(heartbeat):
        tries.append(1)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        retry_with_timeout(attempt, "x", RetryPolicy(1, 5), threading.Event(), RateLimitedWarnings())
    assert len(tries) == 1


def test_a_slow_try_that_shows_signs_of_life_is_left_alone():
    def attempt(heartbeat):
        for _ in range(10):
            time.sleep(0.1)
            heartbeat()
        return "done"

    assert (
        retry_with_timeout(attempt, "x", RetryPolicy(0.4, 0), threading.Event(), RateLimitedWarnings())
        == "done"
    )
