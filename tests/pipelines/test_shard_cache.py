import errno
import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from fcntl import LOCK_EX, flock

import numpy as np
import pytest

from cluster.artifact import Artifact, CorruptArtifact
from cluster.storage import StorageError, Store
from pipelines.shard_cache import ReadAhead, ShardCache
from tests.pipelines.background import eventually, threads
from tests.pipelines.shard_files import far, used

FILES, SIZE = 8, 1000
PATHS = [f"train/{number}.arrow" for number in range(FILES)]


def content(number):
    return bytes([number]) * SIZE


@pytest.fixture
def artifact(tmp_path):
    artifact = Artifact(Store(tmp_path / "store"))
    attempt = artifact.begin()
    attempt.commit({}, [attempt.store.write_bytes(path, content(number)) for number, path in enumerate(PATHS)])
    return artifact


def cache_of(artifact, folder, limit=None, seconds=0.0):
    return ShardCache(far(artifact, seconds), artifact.manifest(), folder, limit)


def copies(folder, artifact):
    found = (folder / artifact.manifest().attempt).glob("train/*.arrow")
    return sorted(int(path.stem) for path in found)


def fetch(cache, *numbers):
    for number in numbers:
        with cache.held(PATHS[number]) as path:
            assert path.read_bytes() == content(number)


def test_a_file_is_copied_once_and_all_caches_of_a_folder_share_it(artifact, tmp_path):
    fetch(cache_of(artifact, tmp_path), 3)
    artifact.files.delete(PATHS[3])
    fetch(cache_of(artifact, tmp_path), 3)
    assert copies(tmp_path, artifact) == [3]


def test_what_was_opened_longest_ago_goes(artifact, tmp_path):
    cache = cache_of(artifact, tmp_path, limit=3 * SIZE)
    for step, (number, expected) in enumerate(
        [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (0, [0, 1, 2]), (3, [0, 2, 3]), (4, [0, 3, 4]), (5, [3, 4, 5])]
    ):
        fetch(cache, number)
        os.utime(tmp_path / artifact.manifest().attempt / PATHS[number], ns=(step, step))  # the disk's clock is coarse
        assert copies(tmp_path, artifact) == expected


def test_one_file_is_kept_under_any_bound(artifact, tmp_path):
    cache = cache_of(artifact, tmp_path, limit=0)
    fetch(cache, 0, 1, 2)
    assert copies(tmp_path, artifact) == [2]


def test_a_removed_copy_stays_readable_where_it_is_mapped(artifact, tmp_path):
    cache = cache_of(artifact, tmp_path, limit=0)
    with cache.held(PATHS[5]) as path:
        mapped = np.memmap(path, np.uint8, "r")
    fetch(cache, 6)
    assert not path.exists() and bytes(mapped) == content(5)


def test_a_file_that_is_held_is_not_removed(artifact, tmp_path):
    cache = cache_of(artifact, tmp_path, limit=2 * SIZE)
    with cache.held(PATHS[0]) as path:
        fetch(cache, 1, 2, 3)
        assert path.exists()
    fetch(cache, 4, 5)
    assert not path.exists()


def hammer(artifact, folder, seed, rounds):
    cache = cache_of(artifact, folder, limit=3 * SIZE, seconds=0.002)
    generator = random.Random(seed)
    fetch(cache, *(generator.randrange(FILES) for _ in range(rounds)))


def test_several_processes_share_a_bounded_cache(artifact, tmp_path):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "cache"
    workers = [context.Process(target=hammer, args=(artifact, folder, seed, 120)) for seed in range(3)]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        most = max(most, used(folder))
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert 2 * SIZE < most <= 3 * SIZE
    assert not list(folder.rglob("*.partial"))


def hang(artifact, folder, number):
    fetch(cache_of(artifact, folder, limit=SIZE, seconds=3600), number)


def test_a_killed_download_blocks_nobody_and_its_room_is_free_again(artifact, tmp_path):
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=hang, args=(artifact, tmp_path / "cache", 2))
    worker.start()
    while not list((tmp_path / "cache").rglob("*.partial")):
        assert worker.is_alive()
        time.sleep(0.01)
    cache = cache_of(artifact, tmp_path / "cache", limit=SIZE)
    cache.fetch_unless_locked(PATHS[2])  # comes back at once
    waiting = threading.Thread(target=fetch, args=(cache, 4))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive(), "the bound holds for files on their way too"
    os.kill(worker.pid, signal.SIGKILL)
    waiting.join(10)
    assert not waiting.is_alive() and copies(tmp_path / "cache", artifact) == [4]
    fetch(cache, 2)
    worker.join()


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"x", lambda data: None])
def test_a_wrong_or_missing_file_is_named_and_leaves_nothing(artifact, tmp_path, damage):
    files, wrong = artifact.files, damage(content(1))
    files.delete(PATHS[1])
    if wrong is not None:
        files.write_bytes(PATHS[1], wrong)
    cache = cache_of(artifact, tmp_path / "cache", limit=SIZE)
    with pytest.raises(CorruptArtifact, match=rf"{PATHS[1]} is .*the manifest says"):
        fetch(cache, 1)
    assert used(tmp_path / "cache") == 0 and copies(tmp_path / "cache", artifact) == []
    files.write_bytes(PATHS[1], content(1))
    fetch(cache, 1)


def test_a_full_disk_is_said_and_nothing_is_left_of_the_copy(artifact, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = cache_of(artifact, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=rf"disk is full.* {PATHS[2]} .*cache_bytes"):
        patch.setattr(os, "fsync", full)
        fetch(cache, 2)
    assert used(tmp_path / artifact.manifest().attempt) == 0 and not list(tmp_path.rglob("*.partial"))
    fetch(cache, 2)


def test_a_process_that_is_forked_meanwhile_holds_no_lock(artifact, tmp_path):
    cache = cache_of(artifact, tmp_path)
    with cache.held(PATHS[3]):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with cache._locked(PATHS[3], wait=False) as free:
            assert free
    finally:
        child.kill()
        child.join()


def test_a_cut_copy_is_made_anew(artifact, tmp_path):
    cache = cache_of(artifact, tmp_path)
    fetch(cache, 7)
    copy = tmp_path / artifact.manifest().attempt / PATHS[7]
    copy.write_bytes(b"cut")
    fetch(cache, 7)
    assert copy.read_bytes() == content(7)


# -- in the background


def test_wanted_files_are_fetched_and_the_thread_ends(artifact, tmp_path):
    before = threads("read-ahead")
    ahead = ReadAhead(cache_of(artifact, tmp_path, limit=4 * SIZE))
    ahead.want([PATHS[4], PATHS[1]])
    eventually(lambda: copies(tmp_path, artifact) == [1, 4])
    ahead.want([PATHS[2]])
    eventually(lambda: copies(tmp_path, artifact) == [1, 2, 4])
    ahead.check()
    ahead.close()
    eventually(lambda: threads("read-ahead") == before)
    ahead = ReadAhead(cache_of(artifact, tmp_path))
    assert len(threads("read-ahead") - before) == 1
    del ahead
    gc.collect()
    eventually(lambda: threads("read-ahead") == before)


def test_what_another_process_fetches_is_left_to_it(artifact, tmp_path):
    lock = tmp_path / artifact.manifest().attempt / "locks" / PATHS[0]
    lock.parent.mkdir(parents=True)
    with open(lock, "wb") as file:
        flock(file, LOCK_EX)
        ahead = ReadAhead(cache_of(artifact, tmp_path))
        ahead.want(PATHS[:2])
        eventually(lambda: copies(tmp_path, artifact) == [1])
        ahead.check()  # a lock that is held is no error
        assert copies(tmp_path, artifact) == [1]
    ahead.close()


def test_an_error_in_the_background_is_told_once_and_the_thread_goes_on(artifact, tmp_path):
    artifact.files.write_bytes(PATHS[0], b"wrong")
    ahead = ReadAhead(cache_of(artifact, tmp_path))
    ahead.want(PATHS)
    with pytest.raises(CorruptArtifact, match=PATHS[0]):
        eventually(lambda: ahead.check() or False)
    ahead.check()
    ahead.want([PATHS[1]])
    eventually(lambda: copies(tmp_path, artifact) == [1])
    ahead.close()


def test_an_error_that_is_overtaken_by_a_new_wish_is_not_told(artifact, tmp_path):
    """The file is repaired while the thread still holds what it read before."""
    met, repaired = threading.Event(), threading.Event()

    class Slow(ShardCache):
        def fetch_unless_locked(self, path):
            try:
                super().fetch_unless_locked(path)
            except CorruptArtifact:
                met.set()
                repaired.wait(10)
                raise

    artifact.files.write_bytes(PATHS[0], b"wrong")
    ahead = ReadAhead(Slow(far(artifact), artifact.manifest(), tmp_path))
    ahead.want(PATHS[:1])
    assert met.wait(10)
    artifact.files.write_bytes(PATHS[0], content(0))
    ahead.want(PATHS[:2])
    repaired.set()
    eventually(lambda: copies(tmp_path, artifact) == [0, 1])
    ahead.check()
    ahead.close()
