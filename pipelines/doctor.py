"""What `caravan doctor` looks at: small checks, each of one thing, bounded in time, with a remedy for what is wrong.

A check takes what it judges as arguments and returns findings; `checks` wires them to this machine. Those of the store
and of Ray are in pipelines/doctor_cluster.py. What they leave behind: the CPU kernels, compiled if they were not yet.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

State = Literal["ok", "warn", "fail"]

_GIB = 1 << 30
_INSTALL = "pip install -c constraints.txt -e ."
_THREAD = "caravan-doctor"
_FULL = 0.95
"""Ray starts no work on a node whose disk is this full (RAY_local_fs_capacity_threshold)."""


@dataclass(frozen=True)
class Finding:
    """What a check found: one line; `remedy` is one line too, and there for all but `ok`."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """`look` is given up after `seconds`."""

    name: str
    look: Callable[[], Iterable[Finding]]
    seconds: float = 10.0


def examine(checks: Sequence[Check]) -> Iterator[Finding]:
    """The findings of every check, one check after the other.

    One that raises is a failure, and so is one that does not answer in its time; its thread is left behind (`hangs`).
    """
    for check in checks:
        answer: list[Finding] = []
        problem: list[Exception] = []
        thread = threading.Thread(target=_look, args=(check, answer, problem), name=_THREAD, daemon=True)
        thread.start()
        thread.join(check.seconds)
        if thread.is_alive():
            yield Finding(
                check.name, "fail", f"no answer after {check.seconds:g} s", "see that what it asks is up and reachable"
            )
        elif problem:
            told = " ".join(str(problem[0]).split()) or type(problem[0]).__name__
            yield Finding(check.name, "fail", told, "see what the error names")
        else:
            yield from answer


def hangs() -> bool:
    """Whether a check that was given up still hangs, so that only `os._exit` surely ends this process."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _look(check: Check, answer: list[Finding], problem: list[Exception]) -> None:
    try:
        answer.extend(check.look())
    except Exception as error:
        problem.append(error)


def checks(home: Path, temporary: Path, serve_port: int) -> list[Check]:
    """Those of this machine. `home`: CARAVAN_HOME; `temporary`: Ray's folder for sessions."""
    return [
        Check("python", lambda: packages("caravan")),
        Check("torch", lambda: torch_build(Path("/proc/driver/nvidia/version")), 60),
        Check("cpu", lambda: cpu(Path("/proc/cpuinfo"))),
        Check("kernels", kernels, 120),
        Check("memory", lambda: memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))),
        Check("shared memory", lambda: shared_memory(Path("/dev/shm"))),
        Check("disk", lambda: [*disk("CARAVAN_HOME", home), *disk("Ray's temporary folder", temporary)]),
        Check("files", lambda: open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])),
        Check("ports", lambda: ports({serve_port: "serve.port", **_RAY_PORTS})),
    ]


# -- what is installed


def packages(distribution: str) -> Iterator[Finding]:
    """Python's and every package's version against what the distribution's own metadata requires."""
    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        yield Finding("python", "fail", f"{distribution} is not installed in this Python", _INSTALL)
        return
    python, wanted = (
        Version(sys.version.split()[0]),
        SpecifierSet(str(about.json.get("requires_python", ""))),
    )
    if python in wanted:
        yield Finding("python", "ok", f"{python} (wants {wanted})")
    else:
        yield Finding("python", "fail", f"{python}, and {distribution} wants {wanted}", f"install Python {wanted}")
    required = [Requirement(line) for line in metadata.requires(distribution) or []]
    plain = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    yield requirements(plain, {each.name: _installed(each.name) for each in plain})


def requirements(required: Sequence[Requirement], installed: Mapping[str, str | None]) -> Finding:
    """`installed`: versions by name; None for what is not there."""
    wrong = []
    for each in required:
        version = installed[each.name]
        if version is None:
            wrong.append(f"{each.name} is missing")
        elif not each.specifier.contains(version, prereleases=True):
            wrong.append(f"{each.name} {version} is not {each.specifier}")
    if wrong:
        return Finding("packages", "fail", "; ".join(wrong), _INSTALL)
    shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "ray") if name in installed)
    return Finding("packages", "ok", f"all {len(required)} as required" + (f" ({shown})" if shown else ""))


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_build(driver_file: Path) -> Iterator[Finding]:
    """The build of torch, and the GPUs it sees beside those that the machine's driver (`driver_file`) has."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    driver = _driver(driver_file)
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("torch", "ok", f"{torch.__version__}, {build} build; no GPU here")
            return
        remedy = "install the CUDA build of torch" if torch.version.cuda is None else "update the driver (nvidia-smi)"
        yield Finding(
            "torch", "fail", f"{torch.__version__}, {build} build, sees no GPU; the driver is {driver}", remedy
        )
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    told = f"{torch.__version__}, {build} build, driver {driver or 'unknown'}, NCCL {nccl or 'missing'}"
    if nccl is None:
        yield Finding("torch", "warn", told, "install a torch with NCCL; without it only one GPU trains")
    else:
        yield Finding("torch", "ok", told)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = f"{torch.cuda.get_device_name(number)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        if free < 0.9 * total:
            yield Finding(f"gpu {number}", "warn", name, "see what else runs on it: nvidia-smi")
        else:
            yield Finding(f"gpu {number}", "ok", name)


def _driver(file: Path) -> str | None:
    """The NVIDIA driver's version; None without one."""
    try:
        words = file.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


# -- the machine

_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
"""Those that change what the kernels of llama/kernels compile to; the last three are ARM's."""
_WIDE = ("avx2", "avx512f", "asimd")


def cpu(info: Path) -> Iterator[Finding]:
    """Cores that this process may use, and the instruction sets that the kernels make use of."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = info.read_text().splitlines()
    except OSError:
        yield Finding("cpu", "ok", f"{cores} cores; {info} does not tell its instruction sets")
        return
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    has = [name for name in _INSTRUCTIONS if name in flags]
    told = f"{cores} cores, {', '.join(has) or 'no vector instructions that the kernels know'}"
    if any(name in flags for name in _WIDE):
        yield Finding("cpu", "ok", told)
    else:
        yield Finding("cpu", "warn", told, "models compute slowly here; take a machine with AVX2 or NEON")


def kernels() -> Iterator[Finding]:
    """Whether the CPU kernels can be had: compiled before, or now."""
    from llama.kernels import native

    if os.environ.get("CARAVAN_NATIVE") == "0":
        yield Finding("kernels", "warn", "CARAVAN_NATIVE=0 turns them off", "unset CARAVAN_NATIVE")
        return
    try:
        yield Finding("kernels", "ok", f"compiled: {native.build(native.cache_directory())}")
    except native.Unavailable as error:
        yield Finding("kernels", "warn", f"none, plain torch computes: {error}", "install g++, or name one: CXX")


def memory(meminfo: Path, cgroup: Path) -> Iterator[Finding]:
    """What is free for this process: the machine's, or its container's where that has less."""
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in meminfo.read_text().splitlines() if ":" in line}
    free, total, whose = sizes["MemAvailable"], sizes["MemTotal"], "the machine's"
    try:
        limit = int((cgroup / "memory.max").read_text())
        left = limit - int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        limit = left = total
    if limit < total:
        free, total, whose = min(free, left), limit, "the container's"
    told = f"{free / _GIB:.1f} of {whose} {total / _GIB:.1f} GiB free"
    remedy = "end what uses it, or give the container more; Ray kills workers when 95% are used"
    yield Finding("memory", *_by_room(free, _GIB, 4 * _GIB, told, remedy))


def shared_memory(folder: Path) -> Iterator[Finding]:
    """Ray keeps its objects there; a container has 64 MiB unless it is told otherwise."""
    try:
        total, _, free = shutil.disk_usage(folder)
    except OSError as error:
        remedy = "mount one; without it Ray keeps its objects on disk"
        yield Finding("shared memory", "warn", f"no {folder} ({error.strerror})", remedy)
        return
    told = f"{free / _GIB:.2f} of {total / _GIB:.2f} GiB of {folder} free"
    remedy = "docker run --shm-size=8g (Kubernetes: an emptyDir of medium Memory); Ray would use the disk instead"
    yield Finding("shared memory", *_by_room(free, 0, 2 * _GIB, told, remedy))


def disk(what: str, folder: Path) -> Iterator[Finding]:
    """Room where `folder` lies, or will lie once it is made."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    total, used, free = shutil.disk_usage(there)
    told = f"{what} {folder}: {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    remedy = f"free some, or move it: {'RAY_TMPDIR' if 'Ray' in what else what}"
    if not os.access(there, os.W_OK):
        yield Finding("disk", "fail", f"{told}; {there} cannot be written", remedy)
    elif used / (used + free) > _FULL:
        yield Finding("disk", "fail", f"{told}; Ray starts nothing above {_FULL:.0%}", remedy)
    else:
        yield Finding("disk", *_by_room(free, _GIB, 10 * _GIB, told, remedy))


def open_files(limit: int) -> Iterator[Finding]:
    if limit == resource.RLIM_INFINITY or limit >= 4096:
        yield Finding("files", "ok", f"{'unlimited' if limit == resource.RLIM_INFINITY else limit} open files allowed")
    else:
        remedy = "ulimit -n 65536 in the shell that starts Ray"
        yield Finding("files", "warn", f"only {limit} open files allowed; a cluster needs thousands", remedy)


_RAY_PORTS = {6379: "ray start --head", 8265: "Ray's dashboard", 10001: "Ray Client"}
"""Ray's own defaults. `caravan up` takes free ones in their place."""


def ports(wanted: Mapping[int, str]) -> Iterator[Finding]:
    """Whether the default ports are free on loopback, by whom they are wanted."""
    taken = {port: reason for port in wanted if (reason := _taken(port)) is not None}
    free = [str(port) for port in wanted if port not in taken]
    if free:
        yield Finding("ports", "ok", f"free: {', '.join(free)}")
    for port, reason in taken.items():
        remedy = "give another with --port" if port in _RAY_PORTS else "caravan status tells if an endpoint has it;"
        if port not in _RAY_PORTS:
            remedy += " else give another: --port, or serve.port"
        yield Finding("ports", "warn", f"{port} ({wanted[port]}) {reason}", remedy)


def _taken(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits for its last packets is no listener
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
    return None


def _by_room(free: float, least: float, wanted: float, told: str, remedy: str) -> tuple[State, str, str]:
    if free < least:
        return "fail", told, remedy
    return ("warn", told, remedy) if free < wanted else ("ok", told, "")


def timed(function: Callable[[], object]) -> float:
    """Milliseconds that a call takes."""
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)
