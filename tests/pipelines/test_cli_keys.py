"""`caravan keys`: what it prints, and what it leaves in the file."""

import json
from pathlib import Path

import pytest

from cluster.serve.keys import KeyFile
from tests.pipelines.test_cli import run_cli


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the command; gives its exit code and what it printed on both streams."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = run_cli(monkeypatch, "keys", *arguments, "--file", tmp_path / "keys.json")
        return code, *capsys.readouterr()

    run.file = KeyFile(tmp_path / "keys.json")
    return run


def test_a_key_is_shown_once_and_works(keys):
    code, key, told = keys("add", "alice", "--tokens-per-minute", 1000, "--isolated", "--priority", -2)
    assert code == 0 and "only time" in told
    record = keys.file.read().find(key.strip().encode())
    assert (record.name, record.tokens_per_minute, record.isolated, record.priority) == ("alice", 1000, True, -2)
    code, added, _ = keys("add", "boss", "--operator", "--json")
    assert keys.file.read().find(json.loads(added)["key"].encode()).operator
    code, listed, _ = keys("list")
    assert code == 0 and "alice" in listed and "1000" in listed and record.sha256[:8] not in listed
    code, listed, _ = keys("list", "--json")
    assert [entry["name"] for entry in json.loads(listed)] == ["alice", "boss"] and "sha256" not in listed
    assert keys("remove", "alice")[0] == 0
    assert [record.name for record in keys.file.read().keys] == ["boss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "alice"], "already"),
        (["add", "a b"], "name"),
        (["remove", "bob"], "there are: alice"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(keys, arguments, words):
    keys("add", "alice")
    before = keys.file.read_bytes()
    code, printed, told = keys(*arguments)
    assert (code, printed) == (1, "") and words in told and told.count("\n") == 1
    assert keys.file.read_bytes() == before


def test_there_is_nothing_to_list_or_remove_without_a_file(keys):
    for arguments in (["list"], ["remove", "alice"]):
        code, _, told = keys(*arguments)
        assert code == 1 and "there is no key file" in told
