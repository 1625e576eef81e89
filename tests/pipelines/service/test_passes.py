import pytest

from pipelines.service.passes import SECONDS, Passes

NOW = 1_800_000_000.0


def test_a_pass_is_good_for_its_time_and_not_a_second_longer() -> None:
    issued = Passes("a-token-of-some-length").issue(NOW)
    again = Passes("a-token-of-some-length")  # of the service that comes after a death
    assert [again.left(issued, NOW + age) for age in (0, SECONDS - 1, SECONDS, 2 * SECONDS)] == [SECONDS, 1, 0, 0]


def test_a_new_token_ends_the_passes_of_the_old_one() -> None:
    assert Passes("another-token-of-length").left(Passes("a-token-of-some-length").issue(NOW), NOW) == 0


@pytest.mark.parametrize(
    "given",
    ["", ".", "x", "9999999999", "9999999999.", "9999999999.00", "-1.00", "²³.00", "9" * 5000, "1e12.ab", "é.é"],
)
def test_what_was_never_issued_is_no_pass(given: str) -> None:
    assert Passes("a-token-of-some-length").left(given, NOW) == 0


def test_a_pass_cannot_be_made_to_last_longer() -> None:
    passes = Passes("a-token-of-some-length")
    until, _, signature = passes.issue(NOW).partition(".")
    assert passes.left(f"{int(until) + 1}.{signature}", NOW) == 0
    assert passes.left(f"0{until}.{signature}", NOW) == 0
