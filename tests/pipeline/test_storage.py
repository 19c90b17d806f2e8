"""Failing storage: each fault has its documented result, within a time limit."""

import hashlib
import logging
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
from pipeline.data.storage import MAX_READ_BYTES, coalesce_spans
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection, RetryPolicy

SLACK_S = 15.0  # for a busy machine; a hanging read would take longer
POLICY = RetryPolicy(1.0, 2, 0.1)


@pytest.fixture
def store(shards):
    with serve(shards) as server:
        yield server


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "set")


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The logged warnings, also after another test called setup_logging()."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    return caplog


def reader_of(path, kind=ShardReader, **settings):
    """A reader that gives up after `POLICY.max_total_s` seconds, unless the settings differ."""
    defaults = {"timeout_s": POLICY.timeout_s, "retries": POLICY.retries, "shuffle_window_shards": 2}
    return kind(path, DataSection(**{**defaults, **settings}), first_delay_s=POLICY.first_delay_s)


def batches_of(reader, size=10):
    sampler, start = reader.sampler(0), 0
    while True:
        yield sampler.locate(np.arange(start, start + size))
        start += size


def read_ahead(reader, size=10, limit=10**6):
    return ReadAhead(reader, batches_of(reader, size), 3, limit)


def read_epoch(reader):
    """Return every sample's bytes by its id."""
    ahead = read_ahead(reader)
    samples = {}
    while len(samples) < reader.num_samples:
        locations, images = next(ahead)
        samples.update(zip(locations.sample_id.tolist(), (image.tobytes() for image in images), strict=True))
    ahead.close()
    return samples


def epoch_error(reader):
    """Return the message of the UserError of reading an epoch, and the seconds until it was raised."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        read_epoch(reader)
    took = time.monotonic() - start
    assert "\n" not in str(error.value)
    return str(error.value), took


# ---- Local and remote sets are equivalent


def test_set_behind_a_url_is_read_as_a_local_one(shards, store):
    assert read_epoch(reader_of(store.url)) == read_epoch(reader_of(shards))


def test_any_fsspec_file_system_works(shards):
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        if path.is_file():
            memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    try:
        assert read_epoch(reader_of("memory://set")) == read_epoch(reader_of(shards))
    finally:
        memory.rm("/set", recursive=True)


@pytest.mark.parametrize(
    "url", ["nosuchthing://set", "http://127.0.0.1:1/set", "http://[::1/set", "http://host:port/set", "https://"]
)
def test_url_that_cannot_be_opened_is_named(url):
    with pytest.raises(UserError, match=re.escape(url)):
        reader_of(url)


def test_url_without_a_set_is_named(store):
    store.directory = store.directory.parent
    with pytest.raises(UserError, match=r"/set/manifest.json: is missing"):
        reader_of(store.url)


def test_set_without_read_permission_is_named_at_once(store):
    store.fault = lambda name: "forbidden"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"/set/manifest.json: permission denied .*403"):
        reader_of(store.url, timeout_s=30.0, retries=5)
    assert time.monotonic() - start < SLACK_S


def test_password_of_a_url_is_not_shown():
    with pytest.raises(UserError) as error:
        reader_of("http://user:secret@127.0.0.1:1/set", retries=0)
    assert "secret" not in str(error.value)


# ---- Faults of a server


@pytest.mark.parametrize("fault", ["stall", "cut", "error"])
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_temporary_fault_is_retried_with_a_warning(shards, store, fault, suffix, warnings):
    store.fail(suffix, fault, times=2)
    reader = reader_of(store.url)
    start = time.monotonic()
    assert read_epoch(reader) == read_epoch(reader_of(shards))
    assert time.monotonic() - start < POLICY.max_total_s + SLACK_S
    message = warnings.messages[0]
    assert message.startswith(f"{store.url}/") and f"{suffix}: " in message and "try 2 of 3" in message


def test_short_response_is_retried(shards, store, warnings):
    store.fail(".tar", "short", times=2)
    assert read_epoch(reader_of(store.url)) == read_epoch(reader_of(shards))
    assert re.search(r"received [\d,]+ of [\d,]+ bytes", warnings.text)


@pytest.mark.parametrize("fault", ["stall", "cut", "error"])
@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_permanent_fault_is_an_error_naming_the_file(store, fault, suffix):
    store.fail(suffix, fault)
    message, took = epoch_error(reader_of(store.url))
    assert message.startswith(f"{store.url}/") and f"{suffix}: cannot be read (tries: 3): " in message
    assert took < POLICY.max_total_s + SLACK_S


def test_server_without_range_requests_is_an_error(store):
    store.fail(".tar", "no_ranges")
    message, _ = epoch_error(reader_of(store.url))
    assert store.url in message and "range requests" in message


def test_batches_before_a_fault_are_returned(store):
    reader = reader_of(store.url, shuffle_window_shards=1)
    last = int(reader.sampler(0).epoch_order(0).shards[-1])
    store.fail(reader.shard_path(last).rsplit("/", 1)[1], "error")
    size = int(reader.shard_sizes[0])
    ahead = read_ahead(reader, size, limit=10**9)
    for _ in range((reader.num_samples - int(reader.shard_sizes[last])) // size):
        next(ahead)
    with pytest.raises(UserError, match=reader.shard_path(last)):
        list(islice(ahead, 2))
    ahead.close()


def test_close_cancels_a_waiting_read(store):
    store.fail(".tar", "stall")
    ahead = read_ahead(reader_of(store.url, timeout_s=1000.0))
    threading.Timer(0.3, ahead.close).start()
    start = time.monotonic()
    with pytest.raises(Cancelled):
        next(ahead)
    assert time.monotonic() - start < SLACK_S


# ---- Shards that change during a run


def changed_during_a_run(copied, change):
    """Read a sample and change the shard that it was read from."""
    reader = reader_of(copied, shuffle_window_shards=1)
    first = int(reader.sampler(0).epoch_order(0).shards[0])
    reader.read(first, 0)
    change(copied / f"{reader.manifest.shards[first].name}.tar")
    return reader


def test_shard_deleted_while_open_is_read_to_its_end(copied, shards):
    reader = changed_during_a_run(copied, os.unlink)
    assert read_epoch(reader) == read_epoch(reader_of(shards))


def test_shard_deleted_before_it_is_opened_is_named(copied):
    reader = reader_of(copied)
    name = reader.manifest.shards[2].name
    (copied / f"{name}.tar").unlink()
    message, took = epoch_error(reader)
    assert f"{name}.tar: is missing" in message and took < SLACK_S


def test_hanging_local_read_times_out(copied):
    """A FIFO without a writer hangs as a dead NFS server does."""
    reader = reader_of(copied)
    path = tar_path(copied, reader.manifest.shards[2])
    path.unlink()
    os.mkfifo(path)
    message, took = epoch_error(reader)
    assert f"{path.name}: cannot be read (tries: 3): no data received for 1 s" in message
    assert took < POLICY.max_total_s + SLACK_S
    os.close(os.open(path, os.O_RDWR))  # releases the hanging threads


def test_truncated_shard_is_named(copied):
    reader = changed_during_a_run(copied, lambda path: os.truncate(path, path.stat().st_size // 2))
    message, took = epoch_error(reader)
    assert ".tar: ends at byte " in message and took < SLACK_S


@pytest.mark.parametrize("how", ["in place", "by name"])
def test_replaced_shard_is_named(copied, other_shards, how):
    def replace(path):
        other = tar_path(other_shards, read_manifest(other_shards).shards[0])
        if how == "in place":
            path.write_bytes(other.read_bytes().ljust(path.stat().st_size, b"\0")[: path.stat().st_size])
        else:
            shutil.copy(other, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)

    if how == "in place":
        reader = changed_during_a_run(copied, replace)
    else:
        reader = reader_of(copied)
        replace(tar_path(copied, reader.manifest.shards[1]))
    message, took = epoch_error(reader)
    assert "no longer holds sample" in message or "truncated" in message
    assert took < SLACK_S


# ---- Reading ahead

SAMPLE_BYTES = 100_000


@pytest.fixture
def even_shards(tmp_path):
    """A set of samples of `SAMPLE_BYTES` bytes."""
    shards = []
    for number in range(6):
        name = shard_name("even", "train", number)
        with open(tmp_path / f"{name}.tar", "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for index in range(20):
                writer.add(f"{number}_{index}", [("jpg", bytes([number, index]) * (SAMPLE_BYTES // 2))])
            digest, data = writer.finish()
        (tmp_path / f"{name}.idx").write_bytes(data)
        shards.append(Shard(name, 20, writer.bytes, digest, len(data), hashlib.sha256(data).hexdigest()))
    manifest = Manifest(1, "even", "train", 0, {}, "0" * 64, 120, 0, {}, (), (), tuple(shards))
    write_manifest(tmp_path, manifest)
    return tmp_path


@pytest.mark.parametrize("batches", [0.1, 3.3, 4.5, 1000])
def test_read_ahead_keeps_order_and_memory_limit(even_shards, batches):
    reader = reader_of(even_shards)
    expected = list(islice(batches_of(reader), 30))
    batch_bytes = 10 * reader.mean_bytes(0)
    ahead = read_ahead(reader, limit=int(batches * batch_bytes))
    largest = 0
    for expected_locations in expected:
        locations, images = next(ahead)
        assert locations.sample_id.tolist() == expected_locations.sample_id.tolist()
        for shard, index, image in zip(locations.shard, locations.index_in_shard, images, strict=True):
            assert image.tobytes() == bytes([shard, index]) * (SAMPLE_BYTES // 2)
        largest = max(largest, ahead.buffered_bytes + 10 * SAMPLE_BYTES)  # before this batch was returned
    ahead.close()
    assert largest <= max(batches, 1) * batch_bytes
    assert largest >= min(batches - 1, 30) * SAMPLE_BYTES  # and the limit is used


@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(1, 10**6)), max_size=30), st.booleans())
def test_coalesced_spans_cover_every_range(ranges, ascending):
    ranges = sorted(ranges) if ascending else ranges
    spans, span_of_range = coalesce_spans([start for start, _ in ranges], [sum(r) for r in ranges], max_gap=1000)
    assert len(span_of_range) == len(ranges)
    for (start, size), number in zip(ranges, span_of_range, strict=True):
        offset, length = spans[number]
        assert offset <= start and start + size <= offset + length <= offset + MAX_READ_BYTES
    assert sum(length for _, length in spans) <= sum(size for _, size in ranges) + 1000 * len(ranges)


class RecordingReader(ShardReader):
    """Records its read requests."""

    def __init__(self, *args, **kwargs):
        self.requests = []
        super().__init__(*args, **kwargs)

    def read_many(self, shard, indexes):
        self.requests.append(list(indexes))
        return super().read_many(shard, indexes)


def test_read_ahead_reads_shards_front_to_back(shards):
    reader = reader_of(shards, RecordingReader)
    ahead = ReadAhead(reader, batches_of(reader), 1, 10**9)
    for _ in range(2 * reader.num_samples // 10):
        next(ahead)
    ahead.close()
    assert all(indexes == sorted(indexes) for indexes in reader.requests)
    assert max(map(len, reader.requests)) > 10  # more than a micro batch contains of a shard


def test_programming_errors_are_not_retried():
    calls = []

    def attempt(heartbeat):
        calls.append(1)
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        retry_with_timeout(attempt, "x", RetryPolicy(1, 5), threading.Event(), RateLimitedWarnings())
    assert len(calls) == 1


def test_heartbeats_prevent_the_timeout():
    def attempt(heartbeat):
        for _ in range(10):
            time.sleep(0.1)
            heartbeat()
        return "done"

    policy = RetryPolicy(0.4, 0)
    assert retry_with_timeout(attempt, "x", policy, threading.Event(), RateLimitedWarnings()) == "done"
