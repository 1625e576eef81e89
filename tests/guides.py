"""The commands that README.md and the pages of docs/ show: found for the tests, and run by tests/evidence/guides.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
GUIDES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = ("caravan", "ray")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def shell_blocks(guide: Path) -> Iterator[list[str]]:
    """The lines of each fenced block without a language, lines that go on (`\\`) as one."""
    for language, block in _BLOCK.findall(guide.read_text("utf-8")):
        if not language:
            yield block.replace("\\\n", " ").splitlines()


def typed_lines(block: list[str]) -> list[str]:
    """What a reader types of a block: what follows a prompt, or in a block without one all lines if one is a
    command; none of a block that only shows a screen or a file."""
    prompted = [line.removeprefix("$ ") for line in block if line.startswith("$ ")]
    if prompted:
        return prompted
    lines = [line for line in block if line.strip() and not line.startswith("#")]
    return lines if any(_is_command(line) for line in lines) else []


def _is_command(line: str) -> bool:
    return (
        re.match(r"(\w+=\S* )*(\. |(caravan|ray|make|curl|openssl|export|mkdir|cd|pip|helm|python3?) )", line)
        is not None
    )


def programs_of(line: str) -> Iterator[list[str]]:
    """The words of every caravan or ray command in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
    lexer.whitespace_split = True
    command: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set("|&;<>()"):
            command.append(token)
            continue
        while command and re.match(r"\w+=", command[0]):
            command.pop(0)
        if command and command[0] in PROGRAMS:
            yield command
        command = []


def shown(guide: Path) -> Iterator[list[str]]:
    """The words of every caravan or ray command in the guide's blocks."""
    for block in shell_blocks(guide):
        for line in typed_lines(block):
            if any(word in PROGRAMS for word in line.split()[:4]):
                yield from programs_of(line)
