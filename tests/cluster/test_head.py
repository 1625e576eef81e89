from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

from cluster.head import make_home, temporary_folder


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
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/somebody/tmp")
    sockets = temporary_folder() / "session_2026-01-31_23-59-59_999999_4194304" / "sockets"
    assert len(str(sockets / "dash_NodeHead")) <= 107 and len(str(sockets / "dash_MetricsHead")) <= 107


def test_a_home_keeps_out_of_git_and_of_jobs_working_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code.py").write_text("")
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / ".caravan"))
    (make_home() / "weights").write_bytes(b"x" * 100)
    taken: list[str] = []
    packaging._dir_travel(tmp_path, [], lambda path: taken.append(path.name), include_gitignore=True)
    assert "code.py" in taken and "weights" not in taken
    (tmp_path / ".caravan" / ".gitignore").write_text("mine\n")
    make_home()
    assert (tmp_path / ".caravan" / ".gitignore").read_text() == "mine\n"
