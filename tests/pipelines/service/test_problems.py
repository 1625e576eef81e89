import pytest

from cluster.head import ClusterError
from cluster.storage import StorageError
from pipelines.service.problems import Problems


def test_what_a_tick_found_is_said_once_it_is_over_and_until_the_next_one_is() -> None:
    problems = Problems()
    with problems.collected(), problems.of("jobs"):
        raise ClusterError("nobody answers")
    assert problems.last() == {"jobs": "nobody answers"}
    with problems.collected():
        assert problems.last() == {"jobs": "nobody answers"}
    assert problems.last() == {}


def test_a_store_that_fails_is_named_whatever_needed_it(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    for _ in range(3):
        with problems.collected(), problems.of("jobs"):
            raise StorageError("no room")
    assert problems.last() == {"store": "no room"}
    assert caplog.text.count("no room") == 1


def test_a_defect_of_one_run_is_noted_and_one_of_all_goes_on() -> None:
    problems = Problems()
    with problems.collected(), problems.of("store", "r"):
        raise KeyError("secret")
    assert problems.last() == {"run r": "the service failed on it (KeyError); its log says where"}
    with pytest.raises(KeyError), problems.collected(), problems.of("store"):
        raise KeyError("secret")
    assert problems.last() == {}


def test_what_was_found_before_a_tick_broke_is_said() -> None:
    problems = Problems()
    with pytest.raises(ZeroDivisionError), problems.collected():
        problems.note("jobs", "refused")
        raise ZeroDivisionError
    assert problems.last() == {"jobs": "refused"}
