import pytest

from pipelines.service.passes import SECONDS, Passes

NOW = 1_800_000_000.0


def test_a_pass_is_good_for_its_time_and_not_a_second_longer() -> None:
    issued = Passes("a-token-of-some-length").issue(NOW)
    again = Passes("a-token-of-some-length")  # of the service that comes after a death
    assert again.holds(issued, NOW) and again.holds(issued, NOW + SECONDS - 1)
    assert not again.holds(issued, NOW + SECONDS)


def test_a_new_token_ends_the_passes_of_the_old_one() -> None:
    assert not Passes("another-token-of-length").holds(Passes("a-token-of-some-length").issue(NOW), NOW)


@pytest.mark.parametrize(
    "given",
    ["", ".", "x", "9999999999", "9999999999.", "9999999999.00", "-1.00", "²³.00", "9" * 5000, "1e12.ab", "é.é"],
)
def test_what_was_never_issued_is_no_pass(given: str) -> None:
    assert not Passes("a-token-of-some-length").holds(given, NOW)


def test_a_pass_cannot_be_made_to_last_longer() -> None:
    passes = Passes("a-token-of-some-length")
    until, _, signature = passes.issue(NOW).partition(".")
    assert not passes.holds(f"{int(until) + 1}.{signature}", NOW)
    assert not passes.holds(f"0{until}.{signature}", NOW)
