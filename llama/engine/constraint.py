"""Output that a JSON schema, a regular expression or a grammar describes; llguidance tells which tokens keep it so.

Compiled once per text and tokenizer, on the caller's thread, before the request is queued. Then each request has a
`Constraint` of its own: which tokens may come next, in the step, without a lock; advanced by the token that was
committed and by nothing else, so that a step that is done again finds it as it was.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llama.engine.params import ConstraintKind, SamplingParams
from llama.engine.text import BytesTokenizer, TextTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 1 << 16
"""Of a constraint's text; compiling it takes 2 seconds at most."""
_STACK_BYTES = 256 << 20
"""llguidance follows references recursively: 64 kB of them overflow the usual 8 MB, which ends the process."""
_MAX_LEXER_STATES = 100_000
"""Up to 2 kB each, for each constraint that is kept; the requests that share it share them. A string of up to a
thousand characters takes a thousand."""
# Tokens are the model's choice: else llguidance asks the tokenizer for those of a text that has to come, and allows no
# others.
_OPTIONS = '%llguidance {"no_forcing": true}'
# One line: with unlimited white space a model may write nothing else.
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}

T = TypeVar("T")


class Constraint:
    """Where one request's output stands in what constrains it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, on_failure: Callable[[], None]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._on_failure = on_failure
        """Called where the matcher gave up."""

    def fill(self, mask_W: Tensor) -> bool:
        """Sets the bits of the tokens that may come next, `llama.sampling.allow_only`'s; False if there are none.

        `mask_W`: int32 in the host's memory, `mask_words(vocab_size)` of them.
        """
        mask_W.zero_()
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(mask_W.data_ptr(), mask_W.numel() * 4)
            mask_W[-1] &= (1 << self._vocab_size % 32) - 1  # without the end that is no token of the model
        return not self._matcher.is_error() and bool(mask_W.any())

    def advance(self, token_id: int) -> bool:
        """Takes the request's next token; False if it does not fit, because `fill` found none that does."""
        if self._matcher.try_consume_tokens([token_id]) == 1:
            return True
        if not self.complete:
            reason = _one_line(self._matcher.get_error()) or "no token of the vocabulary goes on with it"
            logger.warning("a constrained output is cut off: %s", reason)
        if self._matcher.is_error():
            self._on_failure()
        return False

    @property
    def complete(self) -> bool:
        """Whether the output so far is a whole one."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def fork(self) -> Constraint:
        """An independent copy at the same place."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size, self._on_failure)


class ConstraintCompiler:
    """Compiles constraints for a model of `vocab_size` tokens and its tokenizer, and keeps the `capacity` last used.

    Safe to use from several threads.
    """

    def __init__(self, tokenizer: TextTokenizer | None, vocab_size: int, *, capacity: int = 32) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._compiled: OrderedDict[tuple[ConstraintKind, str], LLMatcher] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()
        """Of `_compiled`, never held while something is compiled."""
        self._vocabulary_lock = threading.Lock()

    def start(self, params: SamplingParams) -> Constraint | None:
        """The state before the first token; None without a constraint. Takes seconds at worst.

        Raises:
            ValueError: the constraint is no schema, expression or grammar, uses what llguidance does not support, is
                too large, or nothing satisfies it; or there is no tokenizer that tells its tokens' bytes, or no
                llguidance. Names the field. Not recognised, and cut off by `max_tokens`, is a constraint that only
                endless texts satisfy.
        """
        key = params.constraint
        if key is None:
            return None
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
        if matcher is None:
            matcher = self._compile(*key)
            with self._lock:
                self._compiled[key] = matcher
                if len(self._compiled) > self._capacity:
                    self._compiled.popitem(last=False)
        # Copies share a lexer, whose states only grow: where there are too many, the next request begins anew.
        return Constraint(matcher.deep_copy(), self.vocab_size, lambda: self._forget(key, matcher))

    def _forget(self, key: tuple[ConstraintKind, str], matcher: LLMatcher) -> None:
        with self._lock:
            if self._compiled.get(key) is matcher:
                del self._compiled[key]

    def _compile(self, kind: ConstraintKind, text: str) -> LLMatcher:
        named = f"{kind}={reprlib.repr(text)}"
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{named} has {len(text)} characters, more than {MAX_CHARACTERS}; shorten it")
        llguidance = _llguidance(named)
        vocabulary = self._llguidance_vocabulary(llguidance, named)
        limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        source = _lark(llguidance, kind, text, named)

        def compile() -> tuple[LLMatcher, bytes, str]:
            matcher = llguidance.LLMatcher(vocabulary, source, log_level=0, limits=limits)
            probe = matcher.deep_copy()
            return matcher, probe.compute_bitmask(), probe.get_error()

        matcher, first_mask, error = _on_deep_stack(compile)
        nothing = error.startswith("NoExtension")
        if error and not nothing:
            raise ValueError(f"{named} does not compile: {_one_line(error)}")
        # The bit behind the vocabulary is no token of the model.
        if nothing or not int.from_bytes(first_mask, "little") & ((1 << self.vocab_size) - 1):
            raise ValueError(f"{named} is impossible: no output of this vocabulary satisfies it")
        return matcher

    def _llguidance_vocabulary(self, llguidance: ModuleType, named: str) -> LLTokenizer:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                try:
                    source = _Vocabulary(cast(BytesTokenizer, self._tokenizer), self.vocab_size)
                except (AttributeError, ValueError) as error:
                    raise ValueError(f"{named} needs a tokenizer that tells its token_bytes: {error}") from error
                wrapper = llguidance.TokenizerWrapper(source)
                self._vocabulary = llguidance.LLTokenizer(wrapper, eos_token=source.special_token_ids)
            return self._vocabulary


class _Vocabulary:
    """What llguidance asks of a tokenizer. Behind the model's tokens comes one that stands for the end where no other
    does; the model has no logit for it."""

    def __init__(self, tokenizer: BytesTokenizer, vocab_size: int) -> None:
        known = tokenizer.token_bytes[:vocab_size]
        self.tokens = [token or b"" for token in known] + [b""] * (vocab_size + 1 - len(known))
        self.special_token_ids = sorted(token for token in tokenizer.eos_ids if token < vocab_size) or [vocab_size]
        self.eos_token_id = self.special_token_ids[0]
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("llguidance asks for no tokens with `no_forcing`")


def mask_words(vocab_size: int) -> int:
    """32-bit words of a mask."""
    return vocab_size // 32 + 1


def _lark(llguidance: ModuleType, kind: ConstraintKind, text: str, named: str) -> str:
    """The constraint as a grammar of llguidance's."""
    if kind == "grammar":
        return f"{text}\n{_OPTIONS}"
    if kind == "regex":
        # Two slashes begin a comment.
        return f"{_OPTIONS}\nstart: " + (f"/{llguidance.regex_to_lark(text, '')}/" if text else '""')
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{named} is not JSON: {error}") from error
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        raise ValueError(f"{named} is not a JSON schema; give an object")
    if "x-guidance" in schema:
        raise ValueError(f"{named} has the key x-guidance, which changes what the schema means; remove it")
    return f"{_OPTIONS}\nstart: %json {json.dumps(schema | {'x-guidance': _JSON_STYLE})}"


def _llguidance(named: str) -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(f"{named} needs llguidance; run: pip install 'llguidance>=1.9,<2'") from error
    return llguidance


def _on_deep_stack(function: Callable[[], T]) -> T:
    """Calls it in a thread with `_STACK_BYTES` of stack, which take memory only as far as they are used."""
    answers: list[T | BaseException] = []

    def run() -> None:
        try:
            answers.append(function())
        except BaseException as error:
            answers.append(error)

    with _stack_size_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="compile-constraint", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    (answer,) = answers
    if isinstance(answer, BaseException):
        raise answer
    return answer


_stack_size_lock = threading.Lock()
"""The size is the process's: that of any thread that begins meanwhile."""


def _one_line(message: str) -> str:
    """llguidance's message without its state and the source that it quotes, our own lines among it."""
    lines = re.split(r"\n<|\n *1 \| ", message)[0].split("\n")
    return re.sub(r"^(at )?\d+\(\d+\): ", "", " ".join(line.strip() for line in lines if line.strip()))[:300]
