"""Evidence that a training survives what ends its parts: workers, nodes, the driver, the store, the local disk.

    python tests/evidence/training_faults.py --part worker|node|driver|store|disk|begin-commit [--times 5] [--seed N]

Each fault comes five times, at random moments of a training of two workers (ep=2) on a fake cluster of two nodes, with
checkpoints on a real S3 server. Every run must finish on the loss curve of an undisturbed one (same layout: 1e-5), and
no checkpoint that is listed may be unreadable.

    worker         kill -9 of a worker
    node           kill -9 of everything on the node where the workers are; another joins
    driver         kill -9 of `caravan run`, which is then started again
    store          the store answers 500 for a while; resets connections; hangs (SIGSTOP of its object server)
    disk           the disk of Ray's session, with the shard cache, is full for a while (a tmpfs: needs root)
    begin-commit   kill -9 of a worker when parts of a checkpoint are written and its manifest is not

Needs the test dependencies; Swift is installed once into `.cache/swift`. Each part ends within 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import mean

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.evidence.demo import Claims  # noqa: E402
from tests.evidence.training_ground import EVERY, STEPS, Ground, training_ground, wait_until  # noqa: E402

TOLERANCE = 1e-5
_START_SECONDS = 180


@dataclass
class Tally:
    """Of the trials of one fault."""

    finished: int = 0
    hits: int = 0
    worst: float = 0.0
    unrecorded: int = 0
    unreadable: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    failed_checkpoints: int = 0
    starts: int = 0


Fault = Callable[[Ground, BaseProcess, random.Random], float | None]
"""Does harm to a training at work; returns the moment (monotonic seconds), None if the training ended first."""


def kill_worker(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
    for pid in draw.sample(workers := ground.workers(), len(workers)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return time.monotonic()
    return None


def kill_node(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
    node = ground.node_of_workers()
    if node is None:
        return None
    moment = time.monotonic()
    ground.lose_node(node)
    ground.add_node()
    return moment


def kill_driver(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
    if not process.is_alive():
        return None
    process.kill()
    process.join()
    return time.monotonic()


def weather(kind: str) -> Fault:
    def come(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
        if not process.is_alive():
            return None
        moment = time.monotonic()
        ground.proxy.become(kind)  # type: ignore[arg-type]
        time.sleep(draw.uniform(3, 20))
        ground.proxy.become("fair")
        return moment

    return come


def hang_store(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
    if not process.is_alive():
        return None
    server, moment = ground.swift.processes["object"].pid, time.monotonic()
    os.kill(server, signal.SIGSTOP)
    try:
        time.sleep(draw.uniform(10, 40))
    finally:
        os.kill(server, signal.SIGCONT)
    return moment


def fill_disk(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
    assert ground.disk is not None
    if not process.is_alive():
        return None
    ballast, moment = ground.disk / "ballast", time.monotonic()
    try:
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(draw.uniform(5, 20))
    finally:
        ballast.unlink()
    return moment


def kill_in_save(ground: Ground, process: BaseProcess, draw: random.Random) -> float | None:
    """Slows the store down until a checkpoint is begun and not committed."""
    training = ground.training()
    assert training is not None
    before = set(ground.committed())
    ground.proxy.become("slow")

    def begun() -> bool:
        paths = training.list("checkpoints")
        steps = {path.split("/")[1] for path in paths if path.endswith(".bin")}
        whole = {path.split("/")[1] for path in paths if path.endswith("manifest.json")}
        return any(int(step.removeprefix("step-")) not in before for step in steps - whole)

    try:
        if not wait_until(begun, 60, process):
            return None
        return kill_worker(ground, process, draw)
    finally:
        ground.proxy.become("fair")


def try_fault(
    ground: Ground,
    name: str,
    fault: Fault,
    times: int,
    draw: random.Random,
    claims: Claims,
    expected: dict[int, float],
    seconds: float,
    again: bool = False,
    restarts: bool = True,
) -> None:
    tally = Tally()
    for trial in range(2 * times):
        if tally.hits == times:
            break
        ground.forget()
        process = ground.start()
        if not wait_until(ground.starts, _START_SECONDS, process):
            ground.finish(process)
            claims.check(f"{name}: trial {trial + 1} started", "no", False)
            continue
        time.sleep(draw.uniform(0, 0.8 * seconds))
        moment = fault(ground, process, draw)
        if moment is not None and again:
            process = ground.start()
        if moment is not None and restarts and wait_until(lambda: len(ground.starts()) > 1, _START_SECONDS, process):
            tally.recovery.append(time.monotonic() - moment)
        finished = ground.finish(process)
        if moment is None:
            print(f"      {name}: the training ended before the fault; once more", flush=True)
            continue
        tally.hits += 1
        tally.finished += finished
        judge(ground, tally, expected)
        print(
            f"      {name} {tally.hits}: {'finished' if finished else 'FAILED'}, starts "
            f"{[start['resumed_step'] for start in ground.starts()]}, lost {tally.lost[-1]} steps, "
            f"recovery {[round(value, 1) for value in tally.recovery[-1:]]} s, worst {tally.worst:.1e}",
            flush=True,
        )
    claims.check(
        f"{name}: runs that finished", f"{tally.finished} of {tally.hits}", tally.finished == tally.hits == times
    )
    claims.check(
        f"{name}: largest |Δloss|/loss against the undisturbed curve", f"{tally.worst:.1e}", tally.worst <= TOLERANCE
    )
    claims.check(f"{name}: listed checkpoints that cannot be read", tally.unreadable or 0, not tally.unreadable)
    print(
        f"      {name}: steps lost {tally.lost}, starts {tally.starts}, steps without a record {tally.unrecorded}, "
        f"checkpoints left out {tally.failed_checkpoints}",
        flush=True,
    )
    if tally.recovery:
        print(
            f"      {name}: seconds to recovery mean {mean(tally.recovery):.1f}, max {max(tally.recovery):.1f}",
            flush=True,
        )


def judge(ground: Ground, tally: Tally, expected: dict[int, float]) -> None:
    curve = ground.curve()
    tally.unrecorded += len(expected.keys() - curve.keys())
    shared = curve.keys() & expected.keys()
    difference = max((abs(curve[step] - expected[step]) / expected[step] for step in shared), default=float("inf"))
    tally.worst = max(tally.worst, difference if STEPS in curve else float("inf"))
    tally.unreadable += ground.unreadable()
    starts, steps = ground.starts(), list(ground.steps_by_start().values())
    tally.starts += len(starts)
    resumed = [start["resumed_step"] for start in starts[1:]]
    tally.lost.append(sum(max(0, done[-1] - step) for done, step in zip(steps, resumed, strict=False)))
    training = ground.training()
    if training is not None:
        for path in training.list("attempts"):
            if path.endswith("summary.json"):
                tally.failed_checkpoints += training.read_json(path)["failed_checkpoints"]


FAULTS: dict[str, list[tuple[str, Fault]]] = {
    "worker": [("worker", kill_worker)],
    "node": [("node", kill_node)],
    "driver": [("driver", kill_driver)],
    "store": [("500s", weather("500")), ("resets", weather("reset")), ("hang", hang_store)],
    "disk": [("disk", fill_disk)],
    "begin-commit": [("begin-commit", kill_in_save)],
}


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=FAULTS, required=True)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    claims, draw, began = Claims(), random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="caravan-faults-") as folder:
        disk = small_disk(Path(folder) / "disk") if arguments.part == "disk" else contextmanager(lambda: (yield None))()
        with disk as place, training_ground(Path(folder), disk=place) as ground:
            process = ground.start()
            wait_until(ground.starts, _START_SECONDS, process)
            training_began = time.monotonic()
            if not ground.finish(process):
                sys.exit("the undisturbed run failed")
            seconds = time.monotonic() - training_began
            expected = ground.curve()
            print(
                f"      undisturbed: {STEPS} steps, a checkpoint every {EVERY}, {seconds:.1f} s after the start",
                flush=True,
            )
            claims.check("undisturbed: steps on record", len(expected), len(expected) == STEPS)
            for name, fault in FAULTS[arguments.part]:
                try_fault(
                    ground,
                    name,
                    fault,
                    arguments.times,
                    draw,
                    claims,
                    expected,
                    seconds,
                    again=arguments.part == "driver",
                    restarts=arguments.part not in ("store", "disk"),
                )
    minutes = (time.monotonic() - began) / 60
    claims.check("minutes", f"{minutes:.1f}", minutes <= 25)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
