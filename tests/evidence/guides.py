"""Evidence that the guides can be typed: runs the commands of their fenced blocks in order, in a new folder each.

    python tests/evidence/guides.py [--page first_run]... [--keep]

`PAGES` says which pages, and of each what is done otherwise than it stands there: what a placeholder stands for, what
has to be there before, what is ended after a while, and what cannot be done on one machine without a network, with the
reason. Everything else is run as it stands. The recipes are the repository's own with less text and fewer steps
(`SMALLER`). A command that fails where its page does not say so fails the whole.

Needs the environment of `make setup`; about 15 minutes on two cores for all pages. Exits non-zero when a command fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.conftest import find_free_port  # noqa: E402
from tests.guides import shell_blocks, typed_lines  # noqa: E402

SMALLER = {
    "data.max_bytes": 600_000,
    "tokenizer.vocab_size": 512,
    "train.steps": 12,
    "train.checkpoint_every": 4,
    "train.validate_every": 6,
    "evaluate.sample_tokens": 8,
    "serve.requests": {"conversations": 1, "turns": 2, "max_tokens": 4},
}
"""Only keys whose section the recipe has; `data.max_bytes` of none that names its own files."""
LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class How:
    """What is done with a line that begins so. `reason`: it is not run. `instead`: what is run in its place. `before`:
    lines that are run before it. `end_after`: it is ended after so many seconds, or once `end_at` was printed, by
    `signal`."""

    line: str
    reason: str = ""
    instead: str = ""
    before: Sequence[str] = ()
    end_after: float = 0.0
    end_at: str = ""
    signal: int = signal.SIGINT


@dataclass(frozen=True)
class Page:
    """`files`: by their names, what is in the folder before; `words`: what is written in place of what is there."""

    name: str
    lines: Sequence[How] = ()
    files: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    first: Sequence[str] = ()
    last: Sequence[str] = ()


TEXTS = {
    f"my/texts/{number}.txt": "".join(f"Day {day} of journey {number}: {day * number} miles.\n" for day in range(200))
    for number in range(40)
}
CONVERSATIONS = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"What is {number} and {number}?"},
                {"role": "assistant", "content": f"It is {2 * number}."},
            ]
        }
    )
    + "\n"
    for number in range(60)
)
RECIPE = "pipelines/recipes/quickstart.yaml"
PAGES = (
    Page(
        "first_run",
        [
            How("make demo", reason="sets up an environment from the package index; tests/evidence/demo.py does it"),
            How(". .venv/bin/activate", reason="the environment is active"),
            How(
                f"caravan run {RECIPE} --set train.optimizer.lr=0.003 --run-id second",
                instead=f"caravan run {RECIPE} --set train.optimizer.lr=0.003 --set train.steps=60 --run-id second",
                end_at="pretrain   step",
                end_after=200,
                signal=signal.SIGKILL,
            ),
        ],
    ),
    Page("data", files=TEXTS),
    Page("explain"),
    Page(
        "comparisons",
        [
            How(
                "caravan sweep pipelines/recipes/sweeps/activations.yaml --run-id",
                end_at="pretrain@gelu.0 done",
                end_after=200,
                signal=signal.SIGKILL,
            )
        ],
    ),
    Page(
        "console",
        [How("head -c 24", before=["caravan down"])],
        words={"~/.caravan-token": "token"},
        last=["caravan down"],
    ),
    Page(
        "runs",
        [
            How("caravan stop RUN", before=["caravan submit recipe.yaml --set train.steps=200"]),
            How("caravan delete RUN", before=["caravan stop RUN"]),
        ],
        words={"STORE": "$PWD/shared", "8265": str(find_free_port())},
    ),
    Page(
        "finetuning",
        files={"my/conversations.jsonl": CONVERSATIONS},
        words={"/models/llama": "models/tuned"},
    ),
    Page("serving", [How("caravan trace cmpl-", instead="caravan trace REQUEST_ID")]),
    Page(
        "operate",
        [How("caravan doctor --store s3://", reason="a bucket, and a cluster elsewhere")],
        first=["caravan run recipe.yaml --until shards"],
        last=["caravan down"],
    ),
)
NOT_HERE = {
    "README": "the same commands as in the pages",
    "cluster": "several machines, an account at AWS, Kubernetes; what can be tried of it on one machine is in runs.md",
    "router_bench": "minutes for each policy, and a trace that does not come along; docs/evidence.md has its runs",
    "model": "benchmarks; docs/evidence.md has their commands and figures",
    "engine": "Python, and benchmarks with peers that are installed from the network",
    "training": "a GPU's benchmark, and recipes that tests/evidence/seq2seq.py runs; the rest is in other pages",
    "serving_security": "tests/evidence/serving_security.py checks each claim of it",
    "design": "one benchmark of the router, half a minute; it has to do with the code and not with a folder",
}
"""Pages whose commands are not run here, and why. `test_guides.py` parses the commands of all."""


class Folder:
    """A new folder with the recipes and what else the page's reader has, in which commands are run."""

    def __init__(self, place: Path, page: Page) -> None:
        self.place = folder = place
        self._words = page.words
        self.port = find_free_port()
        self.output = self.answer = ""
        shutil.copytree(REPOSITORY / "pipelines/recipes", folder / "pipelines/recipes")
        for recipe in (folder / "pipelines/recipes").rglob("*.yaml"):
            if "data" in (values := yaml.safe_load(recipe.read_text())):  # else it is a sweep
                recipe.write_text(yaml.safe_dump(smaller(values, self.port), sort_keys=False))
        shutil.copy(folder / RECIPE, folder / "recipe.yaml")
        program = folder / "bin/caravan"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipelines.cli "$@"\n')
        program.chmod(0o755)
        for name, content in page.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        (folder / ".curlrc").write_text("fail-with-body\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CARAVAN_"))}
        path = os.pathsep.join((str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]))
        self.environment = kept | {
            "PATH": path,
            "PYTHONPATH": str(REPOSITORY),
            "COLUMNS": "120",
            "CURL_HOME": str(folder),
        }

    def newest_run(self) -> str:
        runs = (self.place / ".caravan/store/runs").glob("*/recipe.yaml")
        return max(runs, key=lambda path: path.stat().st_mtime).parent.name

    def filled(self, line: str) -> str:
        """With placeholders replaced: RUN is the newest run, REQUEST_ID the last answer's id."""
        for word, value in self._words.items():
            line = line.replace(word, value)
        if re.search(r"\bRUN\b", line):
            line = re.sub(r"\bRUN\b", self.newest_run(), line)
        if "REQUEST_ID" in line:
            line = line.replace("REQUEST_ID", self.answer)
        return line.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")

    def run(self, line: str, how: How) -> bool:
        """Runs a line; whether it did what the page says."""
        print(f"$ {line}", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.place,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended = self._await(process, how)
        seconds = time.monotonic() - began
        good = ended or process.returncode == 0
        self.answer = next(iter(re.findall(r'"id": ?"((?:chat)?cmpl-[\w-]+)"', self.output)), self.answer)
        print(self.output if not good else self.output[-1500:], end="", flush=True)
        print(f"{'ok  ' if good else 'FAIL'} {seconds:.0f} s, exit code {process.returncode}\n", flush=True)
        return good

    def _await(self, process: subprocess.Popen[bytes], how: How) -> bool:
        """Reads its output to the end; whether it was ended on purpose."""
        deadline = time.monotonic() + (how.end_after or LIMIT_SECONDS)
        said, ended = b"", False
        os.set_blocking(process.stdout.fileno(), False)
        while process.poll() is None:
            said += process.stdout.read() or b""
            late = time.monotonic() > deadline
            if late or (how.end_at and how.end_at.encode() in said):
                ended = bool(how.end_after) and (not late or not how.end_at)
                os.killpg(process.pid, how.signal if how.end_after else signal.SIGTERM)
                process.wait(timeout=60)
                break
            time.sleep(0.1)
        self.output = (said + (process.stdout.read() or b"")).decode(errors="replace")
        return ended


def smaller(recipe: dict, port: int) -> dict:
    for key, value in SMALLER.items():
        section, name = key.split(".", 1)
        if section in recipe and not (key == "data.max_bytes" and name not in recipe[section]):
            recipe[section][name] = value
    recipe.setdefault("serve", {})["port"] = port
    return recipe


def steps(page: Page) -> Iterator[tuple[str, How]]:
    """What is typed for a page, in order. Raises ValueError for a `How` that none of its lines is."""
    text = REPOSITORY / "docs" / f"{page.name}.md"
    typed = [line for block in shell_blocks(text) for line in typed_lines(block)]
    for how in page.lines:
        if not any(line.startswith(how.line) for line in typed):
            raise ValueError(f"docs/{page.name}.md has no line that begins with {how.line!r}")
    for line in [*page.first, *typed, *page.last]:
        fitting = [how for how in page.lines if line.startswith(how.line)]
        how = max(fitting, key=lambda each: len(each.line), default=How(""))
        yield from ((each, How("")) for each in how.before)
        yield how.instead or line, how


def run_page(page: Page, keep: bool) -> tuple[int, int]:
    """Commands that were run, and those of them that failed."""
    done = failed = 0
    folder = Folder(Path(tempfile.mkdtemp(prefix="caravan-guide-")).resolve(), page)
    try:
        for line, how in steps(page):
            if how.reason:
                print(f"# {line}\n     not run: {how.reason}\n", flush=True)
                continue
            done += 1
            failed += not folder.run(folder.filled(line), how)
    finally:
        if (folder.place / ".caravan/cluster.json").exists():
            folder.run("caravan down", How(""))
        if not keep:
            shutil.rmtree(folder.place, ignore_errors=True)
    return done, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", choices=[page.name for page in PAGES], action="append")
    parser.add_argument("--keep", action="store_true", help="leave the folders")
    parser.add_argument("--list", action="store_true", help="say what would be run")
    arguments = parser.parse_args()
    pages = [page for page in PAGES if not arguments.page or page.name in arguments.page]
    if arguments.list:
        for page in pages:
            for line, how in steps(page):
                print(f"{page.name:<12} {f'# {line}: {how.reason}' if how.reason else line}")
        return 0
    began, counts = time.monotonic(), []
    for page in pages:
        print(f"==== docs/{page.name}.md", flush=True)
        counts.append((page.name, *run_page(page, arguments.keep)))
    for name, done, failed in counts:
        print(f"{'FAIL' if failed else 'ok  '} {name:<12} {done} commands, {failed} failed")
    for name, reason in NOT_HERE.items():
        print(f"     {name:<12} not run: {reason}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    return 1 if any(failed for _, _, failed in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
