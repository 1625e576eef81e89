from pathlib import Path

import pytest

from cluster.head import temporary_folder


def test_two_homes_share_no_folder_of_ray_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the jobs of the one would be driven on the other, which is the folder's current cluster."""
    found = []
    for home in ("a", "b", "a"):
        monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / home))
        found.append(temporary_folder())
    assert found[0] == found[2] != found[1]


def test_without_a_home_it_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / ".caravan"))
    named = temporary_folder()
    monkeypatch.delenv("CARAVAN_HOME")
    monkeypatch.chdir(tmp_path)
    assert temporary_folder() == named


def test_the_paths_of_sockets_below_it_are_short_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / ("long" * 20)))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    socket = temporary_folder() / "session_2026-01-31_23-59-59_999999_4194304" / "sockets" / "plasma_store.12"
    assert len(str(socket)) < 107
