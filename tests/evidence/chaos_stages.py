"""Stages that make small files slowly, whose content is known beforehand; each computation is on record in a journal
beside the store."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.stage import StageContext

GRAPH: Mapping[str, tuple[str, ...]] = {"first": (), "left": ("first",), "right": ("first",), "last": ("left", "right")}
"""The stages, in order, and what each reads."""
FILES, FILE_BYTES = 4, 50_000


def compute(context: StageContext, config: dict[str, Any]) -> dict[str, Any]:
    """`config`: `journal`, a file on this machine; `family`, of which the content is; `seconds`."""
    _note(config["journal"], "began", context)
    read = []
    for name in sorted(context.inputs):
        files = context.inputs[name].files
        read.append([files.read_bytes(f"{number}.bin") for number in range(FILES)])
    for number in range(FILES):
        time.sleep(config["seconds"] / FILES)
        with context.attempt.store.open_output(f"{number}.bin") as output:
            output.write(_content(context.stage, config["family"], number, read))
        context.record(output.entry)
        context.emit(f"{number + 1} of {FILES} files", fraction=(number + 1) / FILES)
    _note(config["journal"], "ended", context)
    return {"family": config["family"]}


def expected(stage: str, family: int) -> list[bytes]:
    """The content of the stage's files."""
    read = [expected(name, family) for name in sorted(GRAPH[stage])]
    return [_content(stage, family, number, read) for number in range(FILES)]


def read_journal(path: Path) -> list[tuple[str, str, str, str]]:
    """Lines of: began or ended, stage, key, attempt."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(event, stage, key, attempt) for event, stage, key, attempt in (line.split() for line in lines)]


def _content(stage: str, family: int, number: int, read: Iterable[Iterable[bytes]]) -> bytes:
    seed = hashlib.sha256(f"{stage} {family} {number}".encode())
    for files in read:
        for data in files:
            seed.update(data)
    return hashlib.shake_128(seed.digest()).digest(FILE_BYTES)


def _note(journal: str, event: str, context: StageContext) -> None:
    line = f"{event} {context.stage} {context.key} {context.attempt.name}\n"
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())  # one write of a short line is never mixed with another's
    finally:
        os.close(descriptor)
