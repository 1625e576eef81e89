"""The commands that README.md and docs/ show: each is one, with options that exist. None is run."""

import hashlib
import hmac
import re
import shlex
import time
from pathlib import Path

import click
import pytest
import typer
from ray.scripts.scripts import cli as ray_cli

from pipelines.cli import app
from pipelines.webhook import sign
from tests.evidence.guides import NOT_HERE, PAGES, steps
from tests.guides import GUIDES, REPOSITORY, shell_blocks, shown, typed_lines

COMMANDS = {"caravan": typer.main.get_command(app), "ray": ray_cli}


def parse(words: list[str]) -> None:
    """Raises click.UsageError."""
    command, rest, context = COMMANDS[words[0]], words[1:], None
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if not rest:
            raise click.UsageError("a command of it is missing")
        name, rest = rest[0], rest[1:]
        if name not in command.commands:
            raise click.UsageError(f"no command {name}")
        command = command.commands[name]
    if rest != ["--help"]:
        command.make_context(words[0], list(rest), parent=context)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_command_of_the_guides_is_one(guide: Path) -> None:
    for words in shown(guide):
        try:
            parse(words)
        except click.ClickException as error:
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer has a click of its own
                raise
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


def test_commands_are_found_and_wrong_ones_are_seen() -> None:
    for name, least in (("cluster.md", 20), ("operate.md", 3)):
        assert len(list(shown(REPOSITORY / "docs" / name))) >= least
    for wrong in ("caravan run r.yaml --sotre x", "caravan rnu r.yaml", "caravan run", "ray up x.yaml --no-such"):
        with pytest.raises(Exception, match=r"(?i)no such|no command|missing"):
            parse(wrong.split())


def test_what_is_typed_for_each_guide_is_known() -> None:
    typed = {guide.stem for guide in GUIDES if any(typed_lines(block) for block in shell_blocks(guide))}
    assert typed <= {page.name for page in PAGES} | NOT_HERE.keys()
    for page in PAGES:
        assert list(steps(page))


def test_a_screen_is_not_typed(tmp_path: Path) -> None:
    guide = tmp_path / "guide.md"
    guide.write_text(
        "```\n$ caravan runs\nrun  state\n```\n```\nfirst  done\n```\n```yaml\ncaravan: 1\n```\n"
        "```\n# on the head\nA=1 ray start --head \\\n  --block && caravan up\n```\n"
    )
    typed = [typed_lines(block) for block in shell_blocks(guide)]
    assert typed == [["caravan runs"], [], ["A=1 ray start --head    --block && caravan up"]]
    assert list(shown(guide)) == [["caravan", "runs"], ["ray", "start", "--head", "--block"], ["caravan", "up"]]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links(guide: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", guide.read_text("utf-8"))
    assert not [link for link in links if not (guide.parent / link).exists()]


@pytest.mark.parametrize("name", ["cluster.md", "operate.md"])
def test_versions(name: str) -> None:
    text = (REPOSITORY / "docs" / name).read_text("utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    for version in re.findall(r"rayproject/ray:([\d.]+)", text):
        assert version == pins["ray"]


def test_the_receiver_of_the_guide_knows_our_signature() -> None:
    text = (REPOSITORY / "docs" / "operate.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(code, names)  # it is ours
    assert names["hashlib"] is hashlib and names["hmac"] is hmac
    secret, body, now = b"0123456789abcdef", b'{"event":"run.done"}', int(time.time())
    assert names["is_ours"](secret, sign(secret, now, body), body)
    assert not names["is_ours"](secret, sign(secret, now, body), body + b" ")
    assert not names["is_ours"](secret, sign(secret, now - 400, body), body)
    assert not names["is_ours"](secret + b"x", sign(secret, now, body), body)
