"""The node-local cache: bounded, shared, and never trusted without a checksum."""

import fcntl
import hashlib
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

EPOCH = """
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


def section(directory, shards=4, **settings):
    """With room for so many shards of the set, roughly."""
    sizes = [shard.bytes for shard in ShardReader(settings.pop("of")).manifest.shards]
    limit = shards * max(sizes) / 1e9
    return DataSection(
        cache_dir=str(directory), cache_gb=limit, shuffle_window_shards=1, timeout_s=2.0, **settings
    )


def digest(reader):
    total = hashlib.sha256()
    for shard, size in enumerate(reader.shard_sizes):
        for image in reader.read_many(shard, list(range(size))):
            total.update(image.tobytes())
    return total.hexdigest()


def held(directory):
    """Bytes there at one moment (nothing is added under the lock); None where a file went meanwhile."""
    with open(directory / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return sum(path.stat().st_size for path in directory.iterdir())
        except FileNotFoundError:
            return None


def test_each_shard_is_fetched_once_and_then_read_from_the_disk(shards, store, tmp_path):
    data = section(tmp_path, 100, of=shards)
    reader = ShardReader(store.url, data)
    first = digest(reader)
    assert first == digest(ShardReader(shards))
    tars = sorted(name for name in store.requests if name.endswith(".tar"))
    assert tars == sorted(f"{shard.name}.tar" for shard in reader.manifest.shards)
    store.only(".tar", "error")
    assert digest(reader) == digest(ShardReader(store.url, data)) == first


def test_the_bound_holds_at_every_moment_and_what_was_read_last_stays(shards, store, tmp_path):
    data = section(tmp_path, 2, of=shards)
    reader = ShardReader(store.url, data)
    largest, done = 0, threading.Event()

    def watch():
        nonlocal largest
        while not done.is_set():
            largest = max(largest, held(tmp_path) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert digest(reader) == digest(ShardReader(shards))
    done.set()
    watcher.join()
    assert 0 < largest <= data.cache_gb * 1e9
    last = reader.manifest.shards[-1]
    assert (tmp_path / f"{last.sha256}.tar").exists()


def test_a_cache_that_holds_less_than_is_read_at_a_time_is_refused(shards, store, tmp_path):
    data = section(tmp_path, 1.5, of=shards).model_copy(update={"shuffle_window_shards": 2})
    with pytest.raises(UserError, match=r"data.cache_gb: .* raise it, or lower data.shuffle_window_shards"):
        ShardReader(store.url, data)


@pytest.mark.parametrize("room", [2, 100])
def test_processes_share_it(shards, store, tmp_path, room):
    data = section(tmp_path, room, of=shards)
    arguments = ["-c", EPOCH, store.url, tmp_path, data.cache_gb]
    processes = [ForkedProcess(arguments, stdout=PIPE) for _ in range(3)]
    digests = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert digests == {digest(ShardReader(shards))}
    assert not list(tmp_path.glob("*.part")) and held(tmp_path) <= data.cache_gb * 1e9
    if room == 100:
        assert sum(name.endswith(".tar") for name in store.requests) == len(ShardReader(shards).shard_sizes)


@pytest.mark.parametrize("damage", ["a flipped byte", "shortened", "emptied"])
def test_a_damaged_file_is_found_and_fetched_again(shards, store, tmp_path, damage, capfd):
    data = section(tmp_path, 100, of=shards)
    first = digest(ShardReader(store.url, data))
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
    assert digest(ShardReader(store.url, data)) == first
    assert sum(name.endswith(".tar") for name in store.requests) == 1
    assert f"{victim}: is damaged; fetching {store.url}/" in capfd.readouterr().err


def test_a_shard_that_arrives_damaged_is_named_and_not_kept(shards, store, tmp_path):
    original = next(iter(sorted(shards.glob("*.tar"))))
    copy = tmp_path / "set"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    data = bytearray(original.read_bytes())
    data[len(data) // 2] ^= 1
    (copy / original.name).write_bytes(data)
    store.directory = copy
    reader = ShardReader(store.url, section(tmp_path / "cache", 100, of=shards))
    with pytest.raises(UserError, match=f"{store.url}/{original.name}: its sha256 is not the manifest's"):
        digest(reader)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_a_server_that_stalls_for_good_leaves_nothing_locked(shards, store, tmp_path):
    data = section(tmp_path, 100, of=shards).model_copy(update={"timeout_s": 0.3, "retries": 0})
    store.only(".tar", "stall")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be read \(tries: 1\): no answer for 0.3 s"):
        ShardReader(store.url, data).read(0, 0)
    assert time.monotonic() - began < 15
    store.fault = lambda name: None
    assert digest(ShardReader(store.url, data)) == digest(ShardReader(shards))


def test_what_a_killed_process_left_is_used_by_nobody_and_its_room_is_free(shards, store, tmp_path):
    data = section(tmp_path, 2, of=shards)
    store.only(".tar", "stall")
    process = ForkedProcess(["-c", EPOCH, store.url, tmp_path, data.cache_gb])
    while not any(path.stat().st_size for path in tmp_path.glob("*.part")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.fault = lambda name: None
    reader = ShardReader(store.url, data)
    for shard in range(1, len(reader.shard_sizes)):  # not the one that it was fetching
        reader.read(shard, 0)
    assert not list(tmp_path.glob("*.part"))
    assert digest(reader) == digest(ShardReader(shards))


def original(number, fetched=None):
    """A shard of 1,000 equal bytes; `fetched` gets a line each time it is fetched."""
    data = bytes([number]) * 1000

    def fetch(offset, size):
        if fetched is not None:
            fetched.append(number)
        return data[offset : offset + size]

    return CachedShard(f"shard {number}", hashlib.sha256(data).hexdigest(), len(data), fetch)


def test_the_shard_read_longest_ago_goes_first(tmp_path):
    cache, fetched = ShardCache(str(tmp_path), 2000, 0, threading.Event()), []
    for number in (1, 2, 1, 3, 1, 2):
        assert cache.read(original(number, fetched), [(7, 3)]) == [bytes([number]) * 3]
        time.sleep(0.01)
    assert fetched == [1, 2, 3, 2]


def test_a_shard_that_another_process_evicts_is_read_to_its_end(tmp_path):
    ours, theirs = (ShardCache(str(tmp_path), 1000, 4, threading.Event()) for _ in range(2))
    fetched = []
    ours.read(original(1, fetched), [(0, 1)])
    theirs.read(original(2), [(0, 1)])
    assert ours.read(original(1, fetched), [(500, 2)]) == [b"\1\1"]
    assert fetched == [1]


def test_the_room_of_a_fetch_that_was_killed_is_used_again_by_the_next(tmp_path):
    cache, shard = ShardCache(str(tmp_path), 1000, 4, threading.Event()), original(1)
    (tmp_path / f"{shard.sha256}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{original(2).sha256}.part").write_bytes(b"x" * 1000)
    assert cache.read(shard, [(0, 4)]) == [b"\1" * 4]
    assert held(tmp_path) == 1000


def test_threads_that_evict_each_others_shards_all_read_right(tmp_path):
    cache = ShardCache(str(tmp_path), 3000, 2, threading.Event())
    wrong = []

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 8, 100):
            found = cache.read(original(int(number)), [(10, 5), (990, 10)])
            if found != [bytes([number]) * 5, bytes([number]) * 10]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert held(tmp_path) <= 3000


def test_a_directory_that_cannot_be_used_is_named(shards, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file/cache: Not a directory"):
        ShardReader(shards, section(tmp_path / "file" / "cache", of=shards))
