import pytest

from llama.retry import retried


def test_tries_are_counted_and_absence_is_an_answer():
    tries, pauses = [], []

    def fail(error):
        tries.append(error)
        raise error

    with pytest.raises(OSError, match="down"):
        retried(lambda: fail(OSError("down")), "x", pauses=(1, 2), sleep=pauses.append)
    assert (len(tries), pauses) == (3, [1, 2])
    with pytest.raises(FileNotFoundError):
        retried(lambda: fail(FileNotFoundError("none")), "x", sleep=pauses.append)
    with pytest.raises(ValueError):
        retried(lambda: fail(ValueError("wrong")), "x", sleep=pauses.append)
    assert (len(tries), pauses) == (5, [1, 2])
