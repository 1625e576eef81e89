"""Settings of who may ask that change while requests run. What they do to requests is in test_gate."""

import asyncio

import pytest

from cluster.serve.access import Access
from cluster.serve.api_error import ApiError
from cluster.serve.keys import KeyFile, Keys, NoKeyFile


def _status(access: Access, path: str = "/v1/models", key: str = "", host: str | None = None) -> int:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    headers += [(b"host", host.encode("latin-1"))] if host is not None else []
    try:
        access.admit(path, headers)
    except ApiError as error:
        return error.status
    return 200


@pytest.fixture
def file(tmp_path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


def _write(file: KeyFile, **limits: object) -> str:
    """One key; the key itself."""
    keys, key = Keys().with_key("alice", **limits)
    with file.changing() as replace:
        replace(keys)
    return key


def test_nobody_is_let_in_before_it_is_said_who_may(file):
    access = Access()
    assert (_status(access), _status(access, "/caravan/replicas"), _status(access, "/ready")) == (503, 503, 200)
    with pytest.raises(NoKeyFile):
        access.set(file.uri)
    assert _status(access) == 503
    access.set(None)
    assert _status(access) == 200


def test_what_cannot_be_set_changes_nothing(file, tmp_path):
    access = Access()
    key = _write(file)
    access.set(file.uri, ("https://a.b",))
    for api_keys, origins in (((tmp_path / "other.json").as_uri(), ()), (None, ("*",))):
        with pytest.raises(ValueError if origins else NoKeyFile):
            access.set(api_keys, origins)
        assert (_status(access), _status(access, key=key), access.origins) == (401, 200, ("https://a.b",))


def test_the_same_file_again_is_not_needed(file):
    access = Access()
    key = _write(file)
    access.set(file.uri)
    file._store.delete("keys.json")
    access.set(file.uri, ("https://a.b",))
    assert _status(access, key=key) == 200 and _status(access) == 401


def test_limits_are_shared_among_as_many_processes_as_there_are_now(file):
    processes = [1]
    access = Access(lambda: processes[0])
    key = _write(file, requests_per_minute=100, concurrency=3)
    access.set(file.uri)
    headers = [(b"authorization", f"Bearer {key}".encode())]
    _, allowance = access.admit("/v1/models", headers)
    allowance.enter()
    processes[0] = 4
    asyncio.run(access.refresh())
    assert access.admit("/v1/models", headers)[1] is allowance
    assert allowance.headers()["x-ratelimit-limit-requests"] == "25"
    with pytest.raises(ApiError, match="1 requests at once"):
        allowance.enter()


def test_a_key_file_that_changes_is_read_again(file):
    async def scenario() -> None:
        access = Access()
        before = _write(file)
        access.set(file.uri)
        assert _status(access, key=before) == 200
        follower = asyncio.create_task(access.follow(period_s=0.001))
        key = _write(file)
        while _status(access, key=key) != 200:
            await asyncio.sleep(0.001)
        follower.cancel()
        assert _status(access, key=before) == 401

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[
            (host, 200)
            for host in ("localhost", "LocalHost:8000", "my.localhost", "127.0.0.1:8000", "10.0.0.7", "[::1]:80")
        ],
        *[
            (host, 403)
            for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "")
        ],
        *[(host, 403) for host in ("[::1", "a@evil.example", "localhost@evil.example", "xlocalhost", "\xff")],
    ],
)
def test_without_keys_a_name_that_anybody_may_own_is_no_way_in(file, host, status):
    access = Access()
    access.set(None)
    assert _status(access, host=host) == status
    key = _write(file)
    access.set(file.uri)
    assert _status(access, key=key, host=host) == 200
