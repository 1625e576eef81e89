import threading
from pathlib import Path

import pytest

from cluster.node_copy import copied_once


def test_one_fills_and_the_others_wait(tmp_path: Path) -> None:
    target, fillers, found = tmp_path / "copies" / "a", [], []

    def fill(folder: Path) -> None:
        fillers.append(folder)
        (folder / "file").write_text("whole")

    def ask() -> None:
        found.append((copied_once(target, lambda copy: True, fill) / "file").read_text())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4 and len(fillers) == 1


def test_half_a_copy_is_never_taken_for_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def break_off(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        copied_once(target, lambda copy: True, break_off)
    assert not target.exists()
    assert copied_once(target, lambda copy: True, lambda folder: (folder / "first").touch()) == target
    assert [path.name for path in target.iterdir()] == ["first"]
    copied_once(target, lambda copy: (copy / "second").exists(), lambda folder: (folder / "second").touch())
    assert [path.name for path in target.iterdir()] == ["second"], "what is damaged is copied anew"
