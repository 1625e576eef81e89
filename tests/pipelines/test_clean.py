import random
import sys
import tracemalloc
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.clean import RULES, Cleaner, Dropped, Kept
from pipelines.data_config import CleanConfig, LanguageConfig
from pipelines.language import check_language, detect_language
from pipelines.sources import DataError

BULLETS = "•‣⁃◦∙▪▫■□●○"
# Few words, so that n-grams repeat, and everything the rules look for.
WORDS = st.sampled_from(
    ["a", "b", "cc", "The", "of", "AND", "#", "...", "…", "x...", "12", "é1", "-", "•x", "*", "模型"]
)
SPACES = st.sampled_from([" ", " ", "\n", "\n\n", "\n \t\n", "\t", " \n", "\x85", "\u2028", ""])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=60).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)


def slow_lines(text):
    return [line.strip() for line in text.split("\n") if line.strip()]


def slow_paragraphs(text):
    paragraphs, lines = [], []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            paragraphs.append("\n".join(lines).strip())
            lines = []
    return paragraphs


def slow_duplicates(units):
    seen, later = set(), []
    for unit in units:
        if unit in seen:
            later.append(unit)
        seen.add(unit)
    chars = sum(map(len, units))
    return (len(later) / len(units), sum(map(len, later)) / chars) if units else (0, 0)


def slow_chars(words, covered):
    """Share of the characters that belong to the words of these numbers."""
    total = sum(map(len, words))
    return sum(len(words[index]) for index in covered) / total if total else 0


def slow_top_ngram(words, n):
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    covers = []
    for top in (gram for gram, count in counts.items() if count == most):
        covers.append({i + k for i, gram in enumerate(grams) if gram == top for k in range(n)})
    return max(slow_chars(words, cover) for cover in covers)


def slow_duplicate_ngrams(words, n):
    seen, covered = set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered |= set(range(i, i + n))
        seen.add(gram)
    return slow_chars(words, covered)


def slow(text):
    """The measure of every rule, straight from its definition."""
    words, lines = text.split(), slow_lines(text)
    stops = {"the", "be", "to", "of", "and", "that", "have", "with"}
    ellipses = len(text.replace("...", "…")) - len(text.replace("...", "…").replace("…", ""))
    bullets = [line for line in lines if line[0] in BULLETS or line[0] in "-*+–—" and (line[1:2] or " ").isspace()]
    duplicate_lines, duplicate_paragraphs = slow_duplicates(lines), slow_duplicates(slow_paragraphs(text))
    count = len(words) or 1
    return {
        "max_chars": len(text),
        "min_words": len(words),
        "max_words": len(words),
        "min_mean_word_chars": sum(map(len, words)) / count,
        "max_mean_word_chars": sum(map(len, words)) / count,
        "max_symbol_ratio": max(text.count("#"), ellipses) / count,
        "max_bullet_line_ratio": len(bullets) / (len(lines) or 1),
        "max_ellipsis_line_ratio": sum(line.endswith(("...", "…")) for line in lines) / (len(lines) or 1),
        "min_alphabetic_word_ratio": sum(any(c.isalpha() for c in word) for word in words) / count,
        "min_stop_words": len(stops & {word.lower() for word in words}),
        "max_duplicate_line_ratio": duplicate_lines[0],
        "max_duplicate_line_char_ratio": duplicate_lines[1],
        "max_duplicate_paragraph_ratio": duplicate_paragraphs[0],
        "max_duplicate_paragraph_char_ratio": duplicate_paragraphs[1],
    }


STRICTEST = {
    "max_chars": 1,
    "min_words": 1000,
    "max_words": 1,
    "min_mean_word_chars": 1000.0,
    "max_mean_word_chars": 1e-9,
    "max_symbol_ratio": 0.0,
    "max_bullet_line_ratio": 0.0,
    "max_ellipsis_line_ratio": 0.0,
    "min_alphabetic_word_ratio": 1.0,
    "min_stop_words": 8,
    "max_duplicate_line_ratio": 0.0,
    "max_duplicate_line_char_ratio": 0.0,
    "max_duplicate_paragraph_ratio": 0.0,
    "max_duplicate_paragraph_char_ratio": 0.0,
}


@given(TEXTS)
def test_rules_measure_what_their_definitions_say(text):
    """Each rule by itself, with the limit that shows its measure of nearly every text."""
    for rule, value in slow(text).items():
        outcome = Cleaner(CleanConfig(**{rule: STRICTEST[rule]}), 0)(text)
        if value < STRICTEST[rule] if rule.startswith("min_") else value > STRICTEST[rule]:
            assert outcome == Dropped(rule, pytest.approx(value, abs=1e-12))
        else:
            assert outcome == Kept(text)


def test_every_rule_of_the_recipe_has_a_definition():
    others = {"unicode", "control_characters", "language"}
    ngrams = {"max_top_ngram_char_ratios", "max_duplicate_ngram_char_ratios"}
    assert {*slow("")} | ngrams | others == set(CleanConfig.model_fields)


def test_rules_are_tried_in_the_order_of_the_settings():
    expected = {name: [name] for name in CleanConfig.model_fields}
    expected["max_chars"].insert(0, "min_document_chars")
    expected["max_top_ngram_char_ratios"] = [f"max_top_{n}gram_char_ratio" for n in (2, 3, 4)]
    expected["max_duplicate_ngram_char_ratios"] = [f"max_duplicate_{n}gram_char_ratio" for n in range(5, 11)]
    assert list(RULES) == [rule for rules in expected.values() for rule in rules]


@given(TEXTS, st.integers(0, 2), st.integers(0, 5))
def test_ngram_rules_measure_what_their_definitions_say(text, top, duplicate):
    words = text.split()
    for kind, first, number, count, slowly in [
        ("top", 2, top, 3, slow_top_ngram),
        ("duplicate", 5, duplicate, 6, slow_duplicate_ngrams),
    ]:
        limits = [1.0] * count
        limits[number] = 0.0
        outcome = Cleaner(CleanConfig(**{f"max_{kind}_ngram_char_ratios": limits}), 1)(text or "x")
        expected = slowly(words, first + number)
        if expected:
            assert outcome == Dropped(f"max_{kind}_{first + number}gram_char_ratio", pytest.approx(expected, abs=1e-12))
        else:
            assert isinstance(outcome, Kept)


LIMITS = {
    "max_chars": 120,
    "min_words": 3,
    "max_words": 40,
    "min_mean_word_chars": 1.3,
    "max_mean_word_chars": 1.9,
    "max_symbol_ratio": 0.3,
    "max_bullet_line_ratio": 0.4,
    "max_ellipsis_line_ratio": 0.3,
    "min_alphabetic_word_ratio": 0.4,
    "min_stop_words": 1,
    "max_duplicate_line_ratio": 0.3,
    "max_duplicate_line_char_ratio": 0.2,
    "max_duplicate_paragraph_ratio": 0.2,
    "max_duplicate_paragraph_char_ratio": 0.1,
}
TOP, DUPLICATE = (0.5, 0.4, 0.35), (0.3, 0.3, 0.3, 0.2, 0.2, 0.1)
EVERY_RULE = CleanConfig(**LIMITS, max_top_ngram_char_ratios=TOP, max_duplicate_ngram_char_ratios=DUPLICATE)


@settings(max_examples=200)
@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_the_first_rule_broken_is_named_and_one_cleaner_serves_many_texts(texts):
    cleaner = Cleaner(EVERY_RULE, 5)
    for text in texts:
        words = text.split()
        measures = [("min_document_chars", len(text), 5)]
        measures += [(rule, value, LIMITS[rule]) for rule, value in slow(text).items()]
        for n, limit in zip((2, 3, 4), TOP, strict=True):
            measures.append((f"max_top_{n}gram_char_ratio", slow_top_ngram(words, n), limit))
        for n, limit in zip(range(5, 11), DUPLICATE, strict=True):
            measures.append((f"max_duplicate_{n}gram_char_ratio", slow_duplicate_ngrams(words, n), limit))
        broken = [rule for rule, value, limit in measures if (value < limit if rule[:4] == "min_" else value > limit)]
        outcome = cleaner(text)
        assert (outcome.rule if isinstance(outcome, Dropped) else None) == (broken[0] if broken else None)


def test_limits_themselves_are_kept():
    config = CleanConfig(min_words=4, max_words=4, min_mean_word_chars=2, max_mean_word_chars=2, max_chars=11)
    assert Cleaner(config, 11)("aa bb cc dd") == Kept("aa bb cc dd")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_text_is_normalised_and_loses_its_control_characters(text, form):
    outcome = Cleaner(CleanConfig(unicode=form, control_characters=True), 0)(text)
    lines = text.replace("\r\n", "\n").translate(dict.fromkeys(map(ord, "\r\v\f\x85"), "\n"))
    without = "".join(c for c in lines if unicodedata.category(c) != "Cc" or c in "\n\t")
    expected = unicodedata.normalize(form, without)
    happened = {"control_characters": without != text, "unicode": expected != without}
    assert outcome == Kept(expected, tuple(rule for rule, changed in happened.items() if changed))


def test_what_a_control_character_divides_is_normalised_too():
    outcome = Cleaner(CleanConfig(unicode="NFC", control_characters=True), 0)("e\x01\u0301 and page\x0ctwo")
    assert outcome == Kept("é and page\ntwo", ("control_characters", "unicode"))


def test_without_rules_a_text_stays_as_it_is():
    text = "a\x00b\x07c e\u0301"
    assert Cleaner(CleanConfig(), 1)(text) == Kept(text)
    assert Cleaner(CleanConfig(), 9)(text) == Dropped("min_document_chars", 8)


def test_characters_are_counted_once_they_are_clean():
    assert Cleaner(CleanConfig(control_characters=True), 3)("a\x00\x00b") == Dropped("min_document_chars", 2)


@pytest.mark.parametrize("separator", [" ", "\n", "x"])
def test_a_long_text_is_measured_like_a_short_one(separator, monkeypatch):
    """In chunks of 50 characters, words longer than a chunk among them."""
    generator = random.Random(separator)
    words = [generator.choice(["a", "bb", "ccc", "d" * 120, "7" * 70]) for _ in range(300)]
    text = separator.join(words)
    configs = [EVERY_RULE, *(CleanConfig(**{rule: limit}) for rule, limit in STRICTEST.items())]
    before = [Cleaner(config, 1)(text) for config in configs]
    monkeypatch.setattr("pipelines.clean._CHUNK_CHARS", 50)
    monkeypatch.setattr("pipelines.clean._KNOWN_WORDS", 2)
    assert [Cleaner(config, 1)(text) for config in configs] == before
    for n, limits in [(2, (0, 1, 1)), (3, (1, 0, 1))]:
        expected = slow_top_ngram(text.split(), n)
        outcome = Cleaner(CleanConfig(max_top_ngram_char_ratios=limits), 1)(text)
        assert (outcome.value if isinstance(outcome, Dropped) else 0) == pytest.approx(expected, abs=1e-12)


def test_memory_stays_in_proportion_to_the_text():
    """4 MB that would be two million strings, and as much without any white space."""
    config = EVERY_RULE.model_copy(update={name: None for name in LIMITS})
    for text in ("ab cd ef gh " * (1 << 18), "模型" * (1 << 19)):
        tracemalloc.start()
        Cleaner(config, 1)(text)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 48 * len(text.encode())


def test_languages_are_told_apart_and_what_is_none_is_dropped():
    english = "The house stands on a hill above the river, and its windows look to the south. " * 3
    german = "Das Haus steht auf einem Hügel über dem Fluss, und seine Fenster blicken nach Süden. " * 3
    cleaner = Cleaner(CleanConfig(language=LanguageConfig(allowed=("en", "fr"))), 1)
    assert cleaner(english) == Kept(english)
    for text, language in [(german, "de"), ("0x7f 0x80 0x81 12 13 14 15 16 17 | | | | 18 19", "zxx")]:
        outcome = cleaner(text)
        assert isinstance(outcome, Dropped) and outcome.rule == "language"
        assert outcome.value == "{} {:.4f}".format(*detect_language(text))
        assert outcome.value.startswith(f"{language} ")
    sure = detect_language("Das Haus")[1]
    for limit, kept in [(sure - 1e-3, True), (sure + 1e-3, False)]:
        rule = LanguageConfig(allowed=(detect_language("Das Haus")[0],), min_probability=limit)
        assert isinstance(Cleaner(CleanConfig(language=rule), 1)("Das Haus"), Kept) == kept


def test_a_long_text_is_judged_by_all_of_it():
    english = "The house stands on a hill above the river, and its windows look to the south. "
    german = "Das Haus steht auf einem Hügel über dem Fluss, und seine Fenster blicken nach Süden. "
    assert detect_language(english * 30 + german * 3000)[0] == "de"


def test_an_unknown_language_and_a_missing_package_are_errors(monkeypatch):
    with pytest.raises(
        DataError, match=r"data.clean.language.allowed has 'qq', which the model .* choose from ace, af"
    ):
        check_language(LanguageConfig(allowed=("en", "qq")))
    check_language(LanguageConfig(allowed=("en", "sr")))
    from pipelines import language

    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(DataError, match=r"pip install 'caravan\[language\]'") as caught:
        Cleaner(CleanConfig(language=LanguageConfig(allowed=("en",))), 1)("some text")
    assert "\n" not in str(caught.value)
