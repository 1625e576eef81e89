"""Compiles the C++ beside this file for this very machine, once, and loads it.

`library` answers with the loaded library, or None where there is none: no compiler, no directory to keep it in, a
compiler that fails. Then one line is logged and everybody computes the same in plain torch.

The library lies in `$XDG_CACHE_HOME/caravan/kernels` (or `~/.cache/...`), named by a hash of the sources, the commands,
the compiler's version and the processor's features: a home shared by different machines holds one for each. Code that
is loaded must not come from others, so the directory has to be the user's own, and writable by nobody else. Processes
that need it at the same time wait for the one that compiles; a file appears whole or not at all.

`CXX` names the compiler, as for make; `CARAVAN_NATIVE=0` turns the kernels off.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-march=native")
_VARIANTS = (("-fopenmp",), ())
"""Without OpenMP the kernels run on one thread."""
_TIMEOUT = 300.0
"""Seconds for the compiler, which needs about ten."""

_lock = threading.Lock()
_loaded: list[ctypes.CDLL | None] = []
"""Empty before the first call."""


class Unavailable(Exception):
    """Why there are no kernels."""


def library() -> ctypes.CDLL | None:
    """The loaded kernels; the first call of a machine compiles them. Safe on any thread."""
    if not _loaded:
        with _lock:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def _load() -> ctypes.CDLL | None:
    if os.environ.get("CARAVAN_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(cache_directory())))
    except (Unavailable, OSError) as error:
        logger.warning("no CPU kernels, computing in plain torch: %s", error)
        return None


def cache_directory() -> Path:
    """Where libraries are kept, made if it is not there.

    Raises:
        Unavailable: it cannot be made, or others could write to it.
    """
    if os.name != "posix":
        raise Unavailable(f"not on {os.name}")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    directory = Path(base) / "caravan" / "kernels"
    try:
        for checked in (directory.parent, directory):
            # Each with its mode: that of parents made on the way is the umask's, which may let the group write.
            checked.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = checked.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise Unavailable(f"{checked} is not a directory of this user; remove it")
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise Unavailable(f"{checked} is writable by others; chmod go-w it")
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"{directory} cannot be made: {error}") from error
    return directory


def build(directory: Path) -> Path:
    """The library in `directory`, compiled if it is not there.

    Raises:
        Unavailable: there is no compiler, or it fails; or `directory` cannot be written.
    """
    compiler = _compiler()
    target = directory / f"{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    try:
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise Unavailable(f"{target} cannot be written: {error}") from error
    return target


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise Unavailable(f"no compiler {chosen[0] if chosen else 'g++, c++ or clang++'}; install one, or set CXX")


def _fingerprint(compiler: list[str]) -> str:
    parts = [path.read_bytes() for path in _source_files("*.cpp") + _source_files("*.h")]
    parts.append(repr((compiler, _FLAGS, _VARIANTS)).encode())
    parts.append(_run([*compiler, "--version"]).encode())
    parts.append(_processor().encode())
    return xxhash.xxh3_128_hexdigest(b"\0".join(parts))


def _source_files(pattern: str) -> list[Path]:
    return sorted(_SOURCES.glob(pattern))


def _processor() -> str:
    """The machine's kind and its instruction sets, as far as they are known."""
    wanted = ("flags", "Features", "model name", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {line.partition(":")[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return "\n".join([platform.machine(), platform.processor(), *map(str, sorted(found.values()))])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        reason = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        raise Unavailable(f"{command[0]} failed: {reason}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
    return done.stdout


def _compile(compiler: list[str], target: Path) -> None:
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    os.close(handle)
    sources = [str(path) for path in _source_files("*.cpp")]
    logger.info("compiling the CPU kernels into %s", target)
    try:
        for position, variant in enumerate(_VARIANTS):
            try:
                _run([*compiler, *_FLAGS, *variant, *sources, "-o", partial])
                break
            except Unavailable:
                if position == len(_VARIANTS) - 1:
                    raise
        os.chmod(partial, 0o700)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file, which the system lets go of if the process dies."""
    import fcntl  # not on every system

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
