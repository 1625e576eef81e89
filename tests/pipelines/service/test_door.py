from pathlib import Path

import pytest

from pipelines.service.door import TokenError, read_token


def write(path: Path, text: bytes, mode: int = 0o600) -> str:
    path.write_bytes(text)
    path.chmod(mode)
    return str(path)


def test_a_token_is_one_word_in_a_file_of_its_owner_s(tmp_path: Path) -> None:
    assert read_token(write(tmp_path / "t", b"0123456789abcdef\n")) == "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (b"0123456789abcdef", 0o640, "open to others; chmod 600"),
        (b"0123456789abcdef", 0o604, "open to others"),
        (b"short", 0o600, "at least 16"),
        (b"", 0o600, "at least 16"),
        (b"0123456789 abcdef", 0o600, "one word"),
        (b"0123456789abcdef\nsecond-line-here", 0o600, "one word"),
        ("0123456789abcdefé".encode(), 0o600, "ASCII"),
    ],
)
def test_what_is_no_token_is_refused_unseen(tmp_path: Path, text: bytes, mode: int, words: str) -> None:
    with pytest.raises(TokenError, match=words) as caught:
        read_token(write(tmp_path / "t", text, mode))
    assert "abcdef" not in str(caught.value) and "short" not in str(caught.value).split(":")[0]


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="cannot be read: No such file"):
        read_token(str(tmp_path / "t"))
