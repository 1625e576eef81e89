"""The key file: what it says, how it is changed, and how it is followed."""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.serve.errors import ServeError
from cluster.serve.keys import KeyFile, Keys, KeysError, LiveKeys, NoKeyFile, check_exposure, check_keys


def _write(path: Path, *names: str) -> dict[str, str]:
    """A key file with these names; the keys."""
    keys, shown = Keys(), {}
    for name in names:
        keys, shown[name] = keys.with_key(name)
    with KeyFile(path).changing() as replace:
        replace(keys)
    return shown


def test_the_file_holds_hashes_that_only_its_owner_may_read(tmp_path):
    path = tmp_path / "new" / "keys.json"
    shown = _write(path, "alice", "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(path.parent) == ["keys.json"]
    entries = {entry["name"]: entry["sha256"] for entry in json.loads(path.read_text())["keys"]}
    assert entries == {name: hashlib.sha256(key.encode()).hexdigest() for name, key in shown.items()}
    assert len(set(shown.values())) == 2 and all(len(key) > 43 for key in shown.values())
    assert not any(key in path.read_text() for key in shown.values())


def test_a_key_is_found_by_itself_alone_and_every_record_is_compared(tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    shown = _write(path, "alice", "bob", "carol")
    keys = KeyFile(path).read()
    for name, key in shown.items():
        assert keys.find(key.encode()).name == name
    compared = []
    genuine = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or genuine(a, b))
    for wrong in (b"", b"x", shown["bob"][:-1].encode(), shown["bob"].encode() + b"\0", b"\xff" * 200):
        compared.clear()
        assert keys.find(wrong) is None and len(compared) == 3
    # Whether it is the first or the last, as many comparisons are made.
    for name in shown:
        compared.clear()
        keys.find(shown[name].encode())
        assert len(compared) == 3


def test_a_symbolic_link_stays_one(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    _write(real, "alice")
    link.symlink_to(real)
    _write(link, "bob")
    assert link.is_symlink() and [record.name for record in KeyFile(real).read().keys] == ["bob"]


def test_keys_added_at_once_are_all_there(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    _write(tmp_path / "keys.json", "first")

    def add(number: int) -> None:
        with file.changing() as replace:
            replace(file.read().with_key(f"key-{number}")[0])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert len(file.read().keys) == 25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not one"),
        ("{", "not one"),
        ("[]", "not one"),
        ('{"keys": [{"name": "a"}]}', "sha256"),
        ('{"keys": [{"name": "../a", "sha256": "0*64"}]}', "name"),
        ('{"keys": [{"name": "a", "sha256": "sk-secret"}]}', "sha256"),
        ('{"keys": [{"name": "a", "sha256": "0*64", "rpm": 1}]}', "rpm"),
        ('{"keys": [{"name": "a", "sha256": "0*64", "concurrency": 0}]}', "concurrency"),
        ('{"keys": [{"name": "a", "sha256": "0*64"}, {"name": "a", "sha256": "1*64"}]}', "same name"),
        ('{"keys": [{"name": "a", "sha256": "0*64"}, {"name": "b", "sha256": "0*64"}]}', "same sha256"),
    ],
)
def test_a_bad_file_is_told_in_one_line_that_shows_no_key(tmp_path, text, words):
    path = tmp_path / "keys.json"
    path.write_text(text.replace("0*64", "0" * 64).replace("1*64", "1" * 64))
    with pytest.raises(KeysError, match=words) as caught:
        check_keys(path)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value) and str(path) in str(caught.value)


def test_an_early_check_gives_the_uri_or_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoKeyFile, match="caravan keys add"):
        check_keys("my keys.json")
    _write(tmp_path / "my keys.json")
    with pytest.raises(KeysError, match="no key in it"):
        check_keys("my keys.json")
    _write(tmp_path / "my keys.json", "alice")
    uri = check_keys("my keys.json")
    assert uri == (tmp_path / "my keys.json").as_uri() and check_keys(uri) == uri
    with pytest.raises(KeysError, match="folder"):
        check_keys(f"file://{tmp_path}/")
    with pytest.raises(KeysError) as caught:
        check_keys("s3://user:secret@bucket/keys.json")
    assert "secret" not in str(caught.value)


def test_names_and_limits_of_a_new_key_are_checked():
    keys, _ = Keys().with_key("alice", tokens_per_minute=5, isolated=True)
    for name, limits, words in (
        ("alice", {}, "already"),
        ("", {}, "name"),
        ("a/b", {}, "name"),
        ("bob\n", {}, "name"),
        ("bob", {"concurrency": 0}, "concurrency"),
    ):
        with pytest.raises(KeysError, match=words):
            keys.with_key(name, **limits)
    with pytest.raises(KeysError, match="alice"):
        keys.without("bob")
    assert keys.without("alice").keys == ()


def test_a_file_is_followed_and_a_broken_one_keeps_the_last_good_keys(tmp_path, caplog, monkeypatch):
    path = tmp_path / "keys.json"
    old = _write(path, "alice")["alice"].encode()
    live = LiveKeys(KeyFile(path))
    log = logging.getLogger("ray.serve")
    monkeypatch.setattr(log, "handlers", [caplog.handler])  # Ray, once imported, does not propagate it
    monkeypatch.setattr(log, "propagate", False)

    async def scenario() -> None:
        await live.refresh()
        path.write_text('{"keys": [')
        await live.refresh()
        await live.refresh()
        assert live.keys.find(old)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        path.unlink()
        await live.refresh()
        assert live.keys.find(old) and len(caplog.records) == 2
        new = _write(path, "bob")["bob"].encode()
        await live.refresh()
        assert live.keys.find(new) and not live.keys.find(old)
        _write(path)
        await live.refresh()
        assert live.keys.keys == ()

    asyncio.run(scenario())
    assert old.decode() not in caplog.text


def test_a_missing_file_refuses_to_start(tmp_path):
    with pytest.raises(NoKeyFile, match="there is no key file"):
        LiveKeys(KeyFile(tmp_path / "keys.json"))


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
    ],
)
def test_an_open_endpoint_on_the_network_is_refused(host, local):
    check_exposure(host, "file:///keys.json")
    if local:
        check_exposure(host, None)
    else:
        with pytest.raises(ServeError, match="--api-key-file"):
            check_exposure(host, None)
