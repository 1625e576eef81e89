"""Evidence that sharding survives whatever ends it: kill -9 at twenty moments, a frozen rival, damage; disk and Swift.

    python tests/evidence/sharding_kills.py [--kills 20] [--only disk|swift] [--seed N]

Of five trials three kill `caravan run` at a random moment of the stage `shards`, and one when the last part is on
record and the manifest is not; it is then started again. One kills a worker of Ray's instead, and the run goes on. The
manifest is compared with that of a run that nobody disturbed, and every file with its checksum.

Needs the test dependencies; Swift is installed once into `.cache/swift`. About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from cluster.artifact import Artifact  # noqa: E402
from cluster.parts import finished_parts  # noqa: E402
from cluster.storage import Store  # noqa: E402
from tests.evidence.demo import Claims, processes_of  # noqa: E402
from tests.swift import running_swift  # noqa: E402

CARAVAN = [sys.executable, "-m", "pipelines.cli"]
RECIPE = REPOSITORY / "pipelines" / "recipes" / "quickstart.yaml"
SETTINGS = ["data.max_bytes=3000000", "data.part_bytes=131072"]
_POLL_SECONDS = 0.005
_LONGEST_SECONDS = 300
_DRIVER, _WORKER, _LAST = "the run", "a worker", "the run after the last part"


def caravan(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """The command, in a process that has imported it already; its output goes to a file."""
    os.environ.update(environment)
    with open(log, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from pipelines.cli import app

    app(arguments)


class Disturbance:
    """A store with everything ready but the shards, and ways to make these."""

    def __init__(self, uri: str, environment: dict[str, str], logs: Path) -> None:
        self.uri = uri
        self.environment = environment
        self.logs = logs
        self._store = Store(uri)
        self._runs = 0
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["pipelines.cli", "pipelines.stages", "pipelines.progress"])

    def start(self, until: str = "shards") -> BaseProcess:
        """`caravan run` in the background, its output in a file of its own."""
        self._runs += 1
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        arguments = ["run", str(RECIPE), "--store", self.uri, "--until", until, *settings]
        process = self._processes.Process(target=caravan, args=(arguments, self.environment, self.log), daemon=True)
        process.start()
        return process

    @property
    def log(self) -> Path:
        return self.logs / f"run-{self._runs:03d}.log"

    def finish(self, process: BaseProcess) -> None:
        if wait(process):
            sys.exit(f"caravan run failed:\n{self.log.read_text()[-3000:]}")

    def run(self, until: str = "shards") -> None:
        self.finish(self.start(until))

    def shards(self) -> Artifact | None:
        """The one artifact of the stage, perhaps not committed; None before anything of it is written."""
        keys = {path.split("/")[2] for path in self._store.list("artifacts/shards")}
        return Artifact(self._store.child("artifacts", "shards", *keys)) if keys else None

    def content(self) -> tuple[Any, ...]:
        artifact = self.shards()
        assert artifact is not None
        manifest = artifact.verify()
        return manifest.files, manifest.metadata

    def forget(self) -> None:
        self._store.delete("artifacts/shards")

    def wait_for_parts(self, number: int, process: BaseProcess) -> bool:
        """Until so many parts are on record; False if the process ended, or committed, first."""
        while process.is_alive():
            artifact = self.shards()
            if artifact is not None:
                if artifact.committed:
                    return False
                if len(finished_parts(artifact)) >= number:
                    return True
            time.sleep(_POLL_SECONDS)
        return False

    def kill_worker(self, process: BaseProcess, draw: random.Random) -> bool:
        """One that is at work, of this place's Ray; False if the run ended first."""
        while process.is_alive():
            if workers := busy_workers(self.environment["CARAVAN_HOME"]):
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(workers), signal.SIGKILL)
                    return True
            time.sleep(_POLL_SECONDS)
        return False


def busy_workers(home: str) -> list[int]:
    """Processes of Ray tasks of a cluster that was started with this CARAVAN_HOME."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if command.startswith(b"ray::Map") and home.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return sorted(found)


def wait(process: BaseProcess) -> int | None:
    process.join(_LONGEST_SECONDS)
    return process.exitcode


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def try_kills(place: str, at: Disturbance, kills: int, draw: random.Random, claims: Claims) -> None:
    at.run(until="tokenizer")
    at.run()
    expected = at.content()
    parts = sum(len(split["shards"]) for split in expected[1]["splits"].values())
    seconds = _seconds_of_parts(at, parts)
    print(f"      {place}: {parts} parts, undisturbed {seconds:.1f} s from the first file to the manifest", flush=True)
    same, between, adopted, workers = 0, 0, 0, 0
    for trial in range(kills):
        at.forget()
        victim = (_DRIVER, _DRIVER, _WORKER, _DRIVER, _LAST)[trial % 5]
        process = at.start()
        alive = at.wait_for_parts(parts if victim == _LAST else 0, process)
        if alive and victim == _DRIVER:
            time.sleep(draw.uniform(0, seconds))
        if victim == _WORKER:
            workers += at.kill_worker(process, draw)
            at.finish(process)
            done = parts
        else:
            kill(process)
            artifact = at.shards()
            done = len(finished_parts(artifact)) if artifact and not artifact.committed else 0
            between += done == parts
            at.run()
            adopted += bool(done) and f"finished {done} of" in at.log.read_text()
        equal = at.content() == expected
        same += equal
        print(f"      {place}, kill {trial + 1}, {victim}: {done} of {parts} parts done, {_word(equal)}", flush=True)
    claims.check(
        f"{place}: {kills} kills, the manifest's content is as undisturbed", f"{same} of {kills}", same == kills
    )
    claims.check(f"{place}: kills between the last part and the manifest", between, between >= kills // 10)
    claims.check(f"{place}: kills of a worker at work, which the run survived", workers, workers >= kills // 10)
    claims.check(f"{place}: restarts that went on from finished parts", adopted, adopted >= kills // 3)


def try_zombie(place: str, at: Disturbance, claims: Claims) -> None:
    """A driver freezes in the middle; its successor finishes; then it wakes up and goes on."""
    expected = at.content()
    at.forget()
    zombie = at.start()
    log = at.log
    working = at.wait_for_parts(2, zombie)
    assert zombie.pid is not None
    os.kill(zombie.pid, signal.SIGSTOP)
    try:
        at.run()
        after_successor = at.content()
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    ended = wait(zombie)
    claims.check(f"{place}: the rival froze in the middle of its work", working, working)
    equal = after_successor == expected == at.content()
    claims.check(
        f"{place}: a frozen rival wakes after its successor's commit; every byte verified", _word(equal), equal
    )
    claims.check(f"{place}: the woken rival ends well, with the winner's shards", ended, ended == 0)
    if ended:
        print(log.read_text()[-3000:])


def try_rivals(place: str, at: Disturbance, claims: Claims) -> None:
    expected = at.content()
    at.forget()
    rivals = [at.start(), at.start()]
    codes = [wait(rival) for rival in rivals]
    equal = at.content() == expected
    claims.check(f"{place}: two drivers at once, both end well", codes, codes == [0, 0])
    claims.check(f"{place}: two drivers at once, every byte verified", _word(equal), equal)


def try_damage(place: str, at: Disturbance, claims: Claims) -> None:
    """Between kill and restart a finished part loses its end, and another changes a byte."""
    expected = at.content()
    at.forget()
    process = at.start()
    at.wait_for_parts(3, process)
    kill(process)
    artifact = at.shards()
    assert artifact is not None
    files = [path for path in artifact.store.list("attempts") if path.endswith(".arrow")]
    damaged = 0
    for path, change in zip(
        files, (lambda data: data[:-100], lambda data: data[:500] + b"?" + data[501:]), strict=False
    ):
        artifact.store.write_bytes(path, change(artifact.store.read_bytes(path)))
        damaged += 1
    at.run()
    equal = at.content() == expected and damaged == 2
    claims.check(f"{place}: {damaged} finished shards damaged before the restart; none is taken", _word(equal), equal)


def _word(equal: bool) -> str:
    return "identical" if equal else "DIFFERENT"


def _seconds_of_parts(at: Disturbance, parts: int) -> float:
    """From the first file to the manifest."""
    at.forget()
    process = at.start()
    at.wait_for_parts(0, process)
    began = time.monotonic()
    at.wait_for_parts(parts + 1, process)
    seconds = time.monotonic() - began
    at.finish(process)
    return seconds


@contextmanager
def ray_head(environment: dict[str, str]) -> Iterator[None]:
    subprocess.run([*CARAVAN, "up"], cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([*CARAVAN, "down"], cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", choices=("disk", "swift"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    claims, draw = Claims(), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="caravan-kills-") as folder:
        scratch = Path(folder)
        (scratch / "logs").mkdir()

        def disturb(place: str, uri: str) -> None:
            environment = os.environ | {"CARAVAN_HOME": str(scratch / f"home-{place}")}
            with ray_head(environment):
                at = Disturbance(uri, environment, scratch / "logs")
                try_kills(place, at, arguments.kills, draw, claims)
                try_zombie(place, at, claims)
                try_rivals(place, at, claims)
                try_damage(place, at, claims)

        if arguments.only != "swift":
            disturb("disk", str(scratch / "store"))
        if arguments.only != "disk":
            (scratch / "swift").mkdir()
            with running_swift(scratch / "swift") as swift:
                disturb("swift", swift.uri(swift.make_bucket(), "store"))
        claims.check("no process is left", processes_of(scratch), not processes_of(scratch))
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
