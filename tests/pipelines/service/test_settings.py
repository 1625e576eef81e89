from pathlib import Path
from typing import Any

import pytest

from cluster.storage import Store
from pipelines.service.actor import choose_port
from pipelines.service.settings import ServiceSettings
from tests.conftest import find_free_port


def test_what_an_operator_sets_is_what_the_parts_get(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    given = {
        "store": str(tmp_path),
        "token_file": str(token),
        "allow": ["/data"],
        "modules": ["m"],
        "caps": {"user": 2},
    }
    settings = ServiceSettings.model_validate({**given, "ageing_seconds": 5})
    assert (settings.queue().caps, settings.queue().ageing_seconds) == ({"user": 2}, 5)
    recipes = settings.recipes()
    assert (recipes.store, recipes.prefixes, recipes.modules) == (Store(tmp_path).uri, ("/data",), ("m",))
    assert settings.token() == "0123456789abcdef"
    assert ServiceSettings(store=str(tmp_path)).token() is None


@pytest.mark.parametrize(
    "change",
    [
        {"store": ""},
        {"store": "ftp://x"},
        {"store": "s3://key:word@bucket/x"},
        {"allow": ["s3:/bucket"]},
        {"allow": ["s3://key:word@bucket"]},
        {"caps": {"user": 0}},
        {"ageing_seconds": 0},
        {"unknown": 1},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        ServiceSettings.model_validate({"store": "/x", **change})
    assert "carries credentials" in str(caught.value) or "word" not in str(caught.value)


def test_a_taken_port_is_one_clear_line() -> None:
    import socket

    from cluster.head import ClusterError

    assert choose_port(port := find_free_port()) == port
    assert choose_port(None) > 0
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ClusterError, match=f"service_port={port} cannot"):
        choose_port(port)
    with pytest.raises(ClusterError, match="service_port=70000"):
        choose_port(70_000)


def test_under_serve_a_token_is_not_optional(tmp_path: Path) -> None:
    from pipelines.service.app import build

    with pytest.raises(ValueError, match="token_file is missing"):
        build(ServiceSettings(store=str(tmp_path)))
    assert build(ServiceSettings(store=str(tmp_path), token_file="/x")) is not None
