"""Each check of `caravan doctor` against something that is right and something that is wrong."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipelines import doctor
from pipelines.doctor import Check, Finding
from tests.pipelines.test_cli import run_cli


def states(findings) -> list[str]:
    return [each.state for each in findings]


def test_a_check_that_hangs_or_raises_is_a_failure_and_the_next_ones_go_on() -> None:
    over = threading.Event()

    def raises() -> list[Finding]:
        raise OSError("the disk\nis on fire")

    checks = [
        Check("slow", lambda: over.wait(30) and [], seconds=0.2),
        Check("broken", raises),
        Check("fine", lambda: [Finding("fine", "ok", "yes")]),
    ]
    started = time.monotonic()
    slow, broken, fine = doctor.examine(checks)
    assert time.monotonic() - started < 10
    assert slow.state == broken.state == "fail" and "no answer after 0.2 s" in slow.found and slow.remedy
    assert broken.found == "the disk is on fire" and broken.remedy
    assert fine == Finding("fine", "ok", "yes")
    assert doctor.hangs()
    over.set()
    deadline = time.monotonic() + 10
    while doctor.hangs() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not doctor.hangs()


def test_requirements_name_what_is_missing_and_what_is_another_version() -> None:
    required = [Requirement("ray[default]>=2.60,<2.61"), Requirement("torch>=2.11,<3"), Requirement("xxhash>=3.5")]
    wrong = doctor.requirements(required, {"ray": "2.59.1", "torch": "2.13.0+cpu", "xxhash": None})
    assert wrong.state == "fail" and "ray 2.59.1" in wrong.found and "xxhash is missing" in wrong.found
    assert "torch" not in wrong.found and "pip install" in wrong.remedy
    assert doctor.requirements(required, {"ray": "2.60.0", "torch": "2.13.0+cpu", "xxhash": "3.6"}).state == "ok"


def test_this_installation_is_as_its_metadata_wants_it() -> None:
    assert states(doctor.packages("caravan")) == ["ok", "ok"]
    missing = list(doctor.packages("no-such-distribution-anywhere"))
    assert states(missing) == ["fail"] and missing[0].remedy


def test_a_driver_that_torch_does_not_see_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert states(doctor.torch_build(tmp_path / "none")) == ["ok"]
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan  1\nGCC")
    (found,) = doctor.torch_build(tmp_path / "version")
    assert found.state == "fail" and "570.86.15" in found.found and found.remedy


@pytest.mark.parametrize(
    ("flags", "state"),
    [("flags\t: fpu sse2 avx2 fma", "ok"), ("flags\t: fpu sse2", "warn"), ("Features\t: asimd", "ok")],
)
def test_vector_instructions(tmp_path: Path, flags: str, state: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    (found,) = doctor.cpu(tmp_path / "cpuinfo")
    assert found.state == state and bool(found.remedy) == (state != "ok")


def test_a_containers_memory_counts_where_it_is_less(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text(f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {32 << 20} kB\n")
    cgroup.mkdir()
    assert [(each.state, "32.0 of the machine's 64.0" in each.found) for each in doctor.memory(meminfo, cgroup)] == [
        ("ok", True)
    ]
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("0\n")
    assert states(doctor.memory(meminfo, cgroup)) == ["ok"]
    (cgroup / "memory.max").write_text(str(8 << 30))
    (cgroup / "memory.current").write_text(str(6 << 30))
    (found,) = doctor.memory(meminfo, cgroup)
    assert found.state == "warn" and "2.0 of the container's 8.0" in found.found
    (cgroup / "memory.current").write_text(str(8 << 30))
    assert states(doctor.memory(meminfo, cgroup)) == ["fail"]


def test_disk_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(used: int, free: int):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: (used + free, used, free))
        (found,) = doctor.disk("CARAVAN_HOME", tmp_path / "not" / "there")
        assert bool(found.remedy) == (found.state != "ok")
        return found.state

    gib = 1 << 30
    assert usage(10 * gib, 90 * gib) == "ok"
    assert usage(10 * gib, 5 * gib) == "warn"
    assert usage(10 * gib, gib // 2) == "fail"
    assert usage(970 * gib, 30 * gib) == "fail", "Ray starts nothing on a disk this full"


def test_open_files() -> None:
    assert states(doctor.open_files(1024)) == ["warn"] and states(doctor.open_files(65536)) == ["ok"]
    assert states(doctor.open_files(doctor.resource.RLIM_INFINITY)) == ["ok"]


def test_shared_memory_of_a_container_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: (64 << 20, 0, 64 << 20))
    (found,) = doctor.shared_memory(tmp_path)
    assert found.state == "warn" and "shm-size" in found.remedy


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = doctor.ports({port: "serve.port"})
        assert found.state == "warn" and str(port) in found.found and "serve.port" in found.remedy
    assert states(doctor.ports({port: "serve.port"})) == ["ok"]


def test_the_command_fails_exactly_if_a_check_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = run_cli(monkeypatch, "doctor", "--json", "--store", tmp_path / "store")
    told = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in told["findings"]} >= {"python", "packages", "torch", "kernels", "store", "ray"}
    assert told["ok"] == (code == 0) == all(each["state"] != "fail" for each in told["findings"])
    assert all(each["remedy"] for each in told["findings"] if each["state"] != "ok")
    assert [each["state"] for each in told["findings"] if each["name"] == "store"] == ["ok"]
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]

    file = tmp_path / "file"
    file.write_text("")
    assert run_cli(monkeypatch, "doctor", "--store", file, "--address", "127.0.0.1:1") == 1
    shown = capsys.readouterr().out
    assert "no cluster answers at 127.0.0.1:1" in shown and "fail store" in shown and "→" in shown
    assert os.path.isfile(file)
