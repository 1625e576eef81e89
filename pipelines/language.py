"""The language of a document, by py3langid: a naive Bayes model of 139 languages inside the package `py3langid`.

Nothing is downloaded and nothing is drawn: the same text has the same language everywhere. The model's class `zxx` is
text in no language, such as numbers or markup.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from pipelines.data_config import LanguageConfig
from pipelines.sources import DataError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

_WHOLE_CHARS = 1 << 14
_STRETCHES = 16  # of a longer text, evenly spaced


def check_language(config: LanguageConfig) -> str:
    """The model's version. Raises DataError if the package is not installed or does not know a language."""
    known = set(_identifier().labels)
    for code in config.allowed:
        if code not in known:
            raise DataError(
                f"data.clean.language.allowed has {code!r}, which the model does not know; "
                f"choose from {', '.join(sorted(known))}"
            )
    return version("py3langid")


def detect_language(text: str) -> tuple[str, float]:
    """The likeliest language of all that the model knows, and its probability.

    A text of more than 16,384 characters is judged by 16 evenly spaced stretches of 1,024: detection is slower than
    all else that is done with a text, and gains nothing from more. Raises DataError without the package.
    """
    if len(text) > _WHOLE_CHARS:
        step, stretch = len(text) // _STRETCHES, _WHOLE_CHARS // _STRETCHES
        text = " ".join(text[begin : begin + stretch] for begin in range(0, step * _STRETCHES, step))
    language, probability = _identifier().classify(text)
    return language, probability


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    """Once in a process: it takes most of a second to load."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError(
            "data.clean.language needs the package py3langid; pip install 'caravan[language]', or leave the rule out"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
