"""A folder of remote files, copied to this machine's disk once, whoever of its processes asks."""

import shutil
from collections.abc import Callable
from fcntl import LOCK_EX, flock
from pathlib import Path


def copied_once(target: Path, is_whole: Callable[[Path], bool], fill: Callable[[Path], None]) -> Path:
    """`target`, a folder that `fill` has written into, unless it is there and whole.

    A second process waits for the first. One that was killed in the middle leaves nothing that a later one would take
    for whole: the folder has its name only once `fill` has returned.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with open(target.with_name(f"{target.name}.lock"), "wb") as lock:
        flock(lock, LOCK_EX)  # ends with the process, however that ends
        if not (target.is_dir() and is_whole(target)):
            for stale in (partial, target):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir()
            fill(partial)
            partial.rename(target)
    return target
