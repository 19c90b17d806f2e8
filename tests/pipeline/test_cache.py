"""The node-local cache is bounded, shared by processes, and verifies checksums."""

import fcntl
import hashlib
import logging
import os
import signal
import threading
import time
from subprocess import PIPE

import numpy as np
import pytest
from forkserver import ForkedProcess
from http_store import serve

from pipeline.data.cache import CachedShard, ShardCache
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe.sections import DataSection

READ_EPOCH = """
import sys, hashlib
from pipeline.data.reader import ShardReader
from pipeline.recipe.sections import DataSection
url, directory, gigabytes = sys.argv[1:]
reader = ShardReader(url, DataSection(cache_dir=directory, cache_gb=float(gigabytes), shuffle_window_shards=1))
digest = hashlib.sha256()
for shard, size in enumerate(reader.shard_sizes):
    for index in range(size):
        digest.update(reader.read(shard, index).tobytes())
print(digest.hexdigest())
"""


@pytest.fixture
def store(shards):
    with serve(shards) as server:
        yield server


@pytest.fixture
def data(shards, tmp_path):
    """Settings of a cache with room for some shards of the set."""

    def make(num_shards, directory=tmp_path, **settings):
        size = max(shard.bytes for shard in ShardReader(shards).manifest.shards)
        settings = {"shuffle_window_shards": 1, "timeout_s": 2.0, **settings}
        return DataSection(cache_dir=str(directory), cache_gb=num_shards * size / 1e9, **settings)

    return make


def digest(reader):
    total = hashlib.sha256()
    for shard, size in enumerate(reader.shard_sizes):
        for image in reader.read_many(shard, list(range(size))):
            total.update(image.tobytes())
    return total.hexdigest()


def cached_bytes(directory):
    """Bytes in the cache at one moment, under its lock; None if a file was renamed meanwhile."""
    with open(directory / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return sum(path.stat().st_size for path in directory.iterdir())
        except FileNotFoundError:
            return None


def test_each_shard_is_fetched_once(shards, store, data):
    reader = ShardReader(store.url, data(100))
    first = digest(reader)
    assert first == digest(ShardReader(shards))
    tars = sorted(name for name in store.requests if name.endswith(".tar"))
    assert tars == sorted(f"{shard.name}.tar" for shard in reader.manifest.shards)
    store.fail(".tar", "error")
    assert digest(reader) == digest(ShardReader(store.url, data(100))) == first


def test_size_limit_always_holds_and_last_shard_stays(shards, store, data, tmp_path):
    settings = data(2)
    reader = ShardReader(store.url, settings)
    largest, done = 0, threading.Event()

    def watch():
        nonlocal largest
        while not done.is_set():
            largest = max(largest, cached_bytes(tmp_path) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert digest(reader) == digest(ShardReader(shards))
    done.set()
    watcher.join()
    assert 0 < largest <= settings.cache_gb * 1e9
    assert (tmp_path / f"{reader.manifest.shards[-1].sha256}.tar").exists()


def test_cache_smaller_than_a_shuffle_window_is_rejected(store, data):
    with pytest.raises(UserError, match=r"data.cache_gb: .*data.shuffle_window_shards"):
        ShardReader(store.url, data(1.5, shuffle_window_shards=2))


@pytest.mark.parametrize("room", [2, 100])
def test_processes_share_the_cache(shards, store, data, tmp_path, room):
    arguments = ["-c", READ_EPOCH, store.url, tmp_path, data(room).cache_gb]
    processes = [ForkedProcess(arguments, stdout=PIPE) for _ in range(3)]
    digests = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert digests == {digest(ShardReader(shards))}
    assert not list(tmp_path.glob("*.part")) and cached_bytes(tmp_path) <= data(room).cache_gb * 1e9
    if room == 100:
        assert sum(name.endswith(".tar") for name in store.requests) == len(ShardReader(shards).shard_sizes)


@pytest.mark.parametrize("damage", ["a flipped byte", "shortened", "emptied"])
def test_damaged_cached_shard_is_fetched_again(store, data, tmp_path, damage, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    first = digest(ShardReader(store.url, data(100)))
    victim = max(tmp_path.glob("*.tar"))
    with open(victim, "r+b") as file:
        if damage == "a flipped byte":
            file.seek(victim.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        else:
            file.truncate(0 if damage == "emptied" else 1024)
    store.requests.clear()
    assert digest(ShardReader(store.url, data(100))) == first
    assert sum(name.endswith(".tar") for name in store.requests) == 1
    assert any(str(victim) in message and store.url in message for message in caplog.messages)


def test_shard_fetched_damaged_is_named_and_not_kept(shards, store, data, tmp_path):
    original = min(shards.glob("*.tar"))
    copy = tmp_path / "set"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray(original.read_bytes())
    content[len(content) // 2] ^= 1
    (copy / original.name).write_bytes(content)
    store.directory = copy
    reader = ShardReader(store.url, data(100, tmp_path / "cache"))
    with pytest.raises(UserError, match=f"{store.url}/{original.name}: sha256"):
        digest(reader)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_stalled_fetch_leaves_no_lock(shards, store, data):
    store.fail(".tar", "stall")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be read \(tries: 1\)"):
        ShardReader(store.url, data(100, timeout_s=0.3, retries=0)).read(0, 0)
    assert time.monotonic() - start < 15
    store.fault = lambda name: None
    assert digest(ShardReader(store.url, data(100))) == digest(ShardReader(shards))


def test_space_of_a_killed_process_is_freed(shards, store, data, tmp_path):
    store.fail(".tar", "stall")
    process = ForkedProcess(["-c", READ_EPOCH, store.url, tmp_path, data(2).cache_gb])
    while not any(path.stat().st_size for path in tmp_path.glob("*.part")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.fault = lambda name: None
    reader = ShardReader(store.url, data(2))
    for shard in range(1, len(reader.shard_sizes)):  # not the one that was being fetched
        reader.read(shard, 0)
    assert not list(tmp_path.glob("*.part"))
    assert digest(reader) == digest(ShardReader(shards))


def original(number, fetched=None):
    """A shard of 1,000 equal bytes; `fetched` gets its number each time it is fetched."""
    content = bytes([number]) * 1000

    def fetch(offset, size):
        if fetched is not None:
            fetched.append(number)
        return content[offset : offset + size]

    return CachedShard(f"shard {number}", hashlib.sha256(content).hexdigest(), len(content), fetch)


def test_least_recently_read_shard_is_evicted_first(tmp_path):
    cache, fetched = ShardCache(str(tmp_path), 2000, 0, threading.Event()), []
    for number in (1, 2, 1, 3, 1, 2):
        assert cache.read(original(number, fetched), [(7, 3)]) == [bytes([number]) * 3]
        time.sleep(0.01)
    assert fetched == [1, 2, 3, 2]


def test_shard_evicted_by_another_process_stays_readable(tmp_path):
    ours, theirs = (ShardCache(str(tmp_path), 1000, 4, threading.Event()) for _ in range(2))
    fetched = []
    ours.read(original(1, fetched), [(0, 1)])
    theirs.read(original(2), [(0, 1)])
    assert ours.read(original(1, fetched), [(500, 2)]) == [b"\1\1"]
    assert fetched == [1]


def test_abandoned_part_files_are_replaced(tmp_path):
    cache, shard = ShardCache(str(tmp_path), 1000, 4, threading.Event()), original(1)
    (tmp_path / f"{shard.sha256}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{original(2).sha256}.part").write_bytes(b"x" * 1000)
    assert cache.read(shard, [(0, 4)]) == [b"\1" * 4]
    assert cached_bytes(tmp_path) == 1000


def test_threads_evicting_each_others_shards_read_correctly(tmp_path):
    cache = ShardCache(str(tmp_path), 3000, 2, threading.Event())
    wrong = []

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 8, 100):
            parts = cache.read(original(int(number)), [(10, 5), (990, 10)])
            if parts != [bytes([number]) * 5, bytes([number]) * 10]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert cached_bytes(tmp_path) <= 3000


def test_unusable_cache_directory_is_named(shards, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file/cache: Not a directory"):
        ShardReader(shards, data(4, tmp_path / "file" / "cache"))
