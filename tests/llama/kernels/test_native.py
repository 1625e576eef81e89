"""The cache of compiled kernels: who may write to it, who compiles, and what happens when nobody can."""

import ctypes
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama.kernels import native

COMPILER = """#!/bin/sh
# Stands in for a slow compiler: says its version, or leaves a mark and writes what it was asked for.
case "$*" in
  *--version*) echo "compiler 1.0"; exit 0 ;;
esac
echo run >> {log}
sleep 0.3
while [ "$1" != "-o" ]; do shift; done
echo {content} > "$2"
exit {status}
"""
BUILD = "import sys, pathlib; from llama.kernels import native; print(native.build(pathlib.Path(sys.argv[1])))"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Sets CXX to a script; returns how often it compiled."""
    log = tmp_path / "log"

    def install(status: int = 0, content: str = "library"):
        script = tmp_path / "cxx"
        script.write_text(COMPILER.format(log=log, status=status, content=content))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len(log.read_text().splitlines()) if log.exists() else 0

    return install


@pytest.fixture
def kernels_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return native.cache_directory()


@pytest.fixture
def unloaded(monkeypatch):
    """As in a fresh process."""
    monkeypatch.setattr(native, "_loaded", [])


def test_the_directory_is_private_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = os.umask(0o002)
    try:
        directory = native.cache_directory()
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (directory, directory.parent)] == [0o700, 0o700]
    assert native.cache_directory() == directory


@pytest.mark.parametrize("mode", [0o770, 0o707])
@pytest.mark.parametrize("level", [0, 1])
def test_a_directory_that_others_can_write_to_is_refused(kernels_directory, mode, level):
    checked = [kernels_directory, kernels_directory.parent][level]
    checked.chmod(mode)
    with pytest.raises(native.Unavailable, match=f"^{checked} is writable by others; chmod go-w it$"):
        native.cache_directory()


def test_a_link_or_a_strangers_directory_is_refused(kernels_directory, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(native.Unavailable, match="is not a directory of this user; remove it$"):
            native.cache_directory()
    kernels_directory.rmdir()
    (tmp_path / "elsewhere").mkdir()
    kernels_directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(native.Unavailable, match="is not a directory of this user; remove it$"):
        native.cache_directory()


def test_processes_and_threads_compile_once_together(kernels_directory, compiler):
    runs = compiler()
    command = [sys.executable, "-c", BUILD, str(kernels_directory)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: native.build(kernels_directory), range(3)))
    paths |= {Path(process.communicate()[0].strip()) for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1 and runs() == 1
    assert paths.pop().read_text() == "library\n"
    assert not list(kernels_directory.glob("*.partial"))


def test_another_compiler_or_source_makes_another_library(kernels_directory, compiler, monkeypatch, tmp_path):
    compiler()
    first = native.build(kernels_directory)
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    second = native.build(kernels_directory)
    (tmp_path / "one.cpp").write_text("int one;")
    monkeypatch.setattr(native, "_SOURCES", tmp_path)
    assert len({first, second, native.build(kernels_directory)}) == 3


def test_no_compiler_leaves_torch(kernels_directory, unloaded, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with caplog.at_level(logging.WARNING):
        assert native.library() is None and native.library() is None
    assert [record.getMessage() for record in caplog.records] == [
        "no CPU kernels, computing in plain torch: no compiler /nowhere/c++; install one, or set CXX"
    ]


def test_a_failing_compiler_leaves_torch_and_no_file(kernels_directory, unloaded, compiler, caplog):
    runs = compiler(status=1)
    caplog.set_level(logging.WARNING)
    assert native.library() is None and native.library() is None
    assert runs() == len(native._VARIANTS), "once with OpenMP and once without"
    assert len(caplog.records) == 1 and "failed" in caplog.text
    assert [path.suffix for path in kernels_directory.iterdir()] == [".lock"]


def test_a_library_that_does_not_load_leaves_torch(kernels_directory, unloaded, compiler, caplog):
    compiler(content="rubbish")
    caplog.set_level(logging.WARNING)
    assert native.library() is None
    assert len(caplog.records) == 1


def test_a_home_that_cannot_be_written_leaves_torch(tmp_path, unloaded, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.library() is None
    assert len(caplog.records) == 1 and "cannot be made" in caplog.text


def test_they_can_be_turned_off(unloaded, monkeypatch, caplog):
    monkeypatch.setenv("CARAVAN_NATIVE", "0")
    assert native.library() is None and not caplog.records


def test_without_openmp_they_compile_too(tmp_path):
    """clang on a Mac has none."""
    try:
        compiler = native._compiler()
    except native.Unavailable as error:
        pytest.skip(str(error))
    out = tmp_path / "kernels.so"
    sources = [str(path) for path in native._source_files("*.cpp")]
    # Nor any vector instructions beyond the processor's baseline; unoptimised, to be quick.
    flags = [flag for flag in native._FLAGS if flag not in ("-march=native", "-O3")]
    native._run([*compiler, *flags, *sources, "-o", str(out)])
    assert ctypes.CDLL(str(out)).linear_max_rows() >= 1
