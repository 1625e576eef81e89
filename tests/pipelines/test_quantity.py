from pipelines.quantity import size_in_words


def test_a_size_has_the_unit_that_keeps_it_short() -> None:
    counts = (0, 999, 1000, 5_250_000, 999_999_999_999, 3e15)
    assert [size_in_words(count) for count in counts] == [
        "0 bytes", "999 bytes", "1.0 KB", "5.2 MB", "1000.0 GB", "3000.0 TB",
    ]  # fmt: skip
