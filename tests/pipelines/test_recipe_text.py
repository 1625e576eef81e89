"""Recipes as text that is hostile."""

import pytest

from pipelines.recipe_text import RecipeError, parse_yaml


@pytest.mark.parametrize("link", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_too_much_are_refused_before_they_are_built(link: str) -> None:
    lines = ["a0: &a0 {k: 1}"]
    for number in range(1, 13):
        lines.append(f"a{number}: &a{number} {link.format(', '.join([f'*a{number - 1}'] * 10))}")
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        parse_yaml("\n".join(lines), "the recipe")
    with pytest.raises(RecipeError, match="more than 100,000 values"):
        parse_yaml("a: &a [*a]", "the recipe")


def test_an_alias_that_is_a_plain_abbreviation_is_read() -> None:
    assert parse_yaml("a: &a {k: 1}\nb: *a\nc: {<<: *a, l: 2}", "it") == {
        "a": {"k": 1},
        "b": {"k": 1},
        "c": {"k": 1, "l": 2},
    }
