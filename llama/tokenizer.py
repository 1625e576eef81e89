"""The tokenizer: text to token ids and back, and chat templates.

A tokenizer directory holds `tokenizer.json` (Hugging Face `tokenizers` format), `tokenizer_config.json` (names of the
special tokens) and `chat_template.jinja`, as `transformers` reads and writes them. A model's directory may hold
`generation_config.json` beside them, whose `eos_token_id` lists every token that ends a generation.

Text is data: a user who types `<|assistant|>` gets its characters, never the control token, in `encode` and inside
chat messages alike. Only a template's own text makes control tokens. How a tokenizer is learned is in
`llama/tokenizer_training.py`; any other `tokenizer.json` with a named end-of-text token will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llama.chat_template import CHAT_TEMPLATE, ChatTemplate, ChatTemplateError, Span

__all__ = ["CHAT_TEMPLATE", "GENERATION_CONFIG_FILE", "SPECIAL_TOKENS", "ChatTemplateError", "Tokenizer"]

GENERATION_CONFIG_FILE = "generation_config.json"
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
"""What a tokenizer trained by Caravan begins its vocabulary with."""

_STRETCH_CHARS = 1 << 18  # until it is dropped, an encoding is more than a hundred times its text


class Tokenizer:
    """A `tokenizers` backend, the special tokens' roles and a chat template.

    Args:
        backend: the tokenizer proper; it becomes this object's, with special-token parsing, truncation, padding and
            dropout off.
        bos_token, eos_token, pad_token: their strings; for a missing `bos_token` or `pad_token` `eos_token` stands in,
            though not in what is saved.
        chat_template: Jinja text, or None when the model has none.
        eos_ids: ids of further tokens that end a generation.

    Raises:
        ValueError: a named token or an id is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = "<|bos|>",
        eos_token: str = "<|eos|>",
        pad_token: str | None = "<|pad|>",
        chat_template: str | None = CHAT_TEMPLATE,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.backend = backend
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, tokenizers.models.BPE):
            backend.model.dropout = None  # else no text has the same ids twice
        self._names = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        self.eos_token = eos_token
        self.bos_token = bos_token or eos_token
        self.pad_token = pad_token or eos_token
        self.bos_id, self.eos_id, self.pad_id = map(self._id, (self.bos_token, self.eos_token, self.pad_token))
        self.eos_ids = frozenset((self.eos_id, *map(self._checked_id, eos_ids)))
        """Every token that ends a generation."""
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        # Some models keep these among their ordinary tokens.
        self._special |= {self.bos_token: self.bos_id, self.eos_token: self.eos_id, self.pad_token: self.pad_id}
        # Unknown text becomes this one; nobody has to write it out.
        unknown = {token for token in self._special if token == _unknown_token(backend)}
        self._control_ids = frozenset(self._special[token] for token in self._special.keys() - unknown)
        self._continuing = _continuing(backend)
        self._template = ChatTemplate(chat_template, self._special) if chat_template is not None else None

    def _id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"the tokenizer has no token {token!r}; name its special tokens in tokenizer_config.json")
        return token_id

    def _checked_id(self, token_id: int) -> int:
        if type(token_id) is not int or token_id < 0 or self.backend.id_to_token(token_id) is None:
            raise ValueError(
                f"eos_token_id={token_id!r} of {GENERATION_CONFIG_FILE} is no id of the vocabulary; remove it"
            )
        return token_id

    @property
    def named_ids(self) -> dict[str, int | list[int] | None]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id` of a model's configs; None where no token is named."""
        ends = [self.eos_id, *sorted(self.eos_ids - {self.eos_id})]
        return {
            "bos_token_id": self.bos_id if self._names["bos_token"] else None,
            "eos_token_id": ends if len(ends) > 1 else self.eos_id,
            "pad_token_id": self.pad_id if self._names["pad_token"] else None,
        }

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id plus one, special tokens included: a model of this size has a row for every id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, nothing added, no control token among them.

        Raises:
            ValueError: the text has half of a surrogate pair, which stands for no character.
        """
        ids, _ = self._encode(text, self.backend)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores that `tokenizers` may use."""
        return self._encode_batch(list(texts), self.backend)

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """`encode_batch` for very much text: all ids one after the other, `[tokens]` of an integer `dtype` that holds
        them, and how many each text has, int64 `[texts]`.

        Long texts are encoded in `stretches`, so what this costs beside the arrays does not grow with a text. A piece
        that would reach across a cut, once in at most 2¹⁸ characters, becomes others that decode to the same text: in
        text without spaces, such as Chinese, and with a tokenizer from outside whose pieces hold spaces. Elsewhere the
        ids are those of `encode`; they depend on the text alone in any case.
        """
        texts = list(texts)
        if max(map(len, texts), default=0) <= _STRETCH_CHARS:
            return self._encode_arrays(texts, dtype, self.backend)
        streams, lengths = [], np.zeros(len(texts), np.int64)
        for index, text in enumerate(texts):
            for number, stretch in enumerate(stretches(text)):
                ids, _ = self._encode_arrays([stretch], dtype, self._within_text if number else self.backend)
                streams.append(ids)
                lengths[index] += len(ids)
        return np.concatenate(streams), lengths

    def _encode_arrays(
        self, texts: list[str], dtype: np.dtype, backend: tokenizers.Tokenizer
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = _joined(_encode_all(texts, backend), dtype)
        if self._is_control[ids].any():
            ids, lengths = _joined(self._encode_batch(texts, backend), dtype)
        return ids, lengths

    def _encode_batch(self, texts: list[str], backend: tokenizers.Tokenizer) -> list[list[int]]:
        return [
            ids if self._control_ids.isdisjoint(ids) else self._encode(text, backend)[0]
            for text, ids in zip(texts, _encode_all(texts, backend), strict=True)
        ]

    @cached_property
    def _is_control(self) -> np.ndarray:
        """By id, bool `[vocab_size]`."""
        table = np.zeros(self.vocab_size, bool)
        table[list(self._control_ids)] = True
        return table

    @cached_property
    def _within_text(self) -> tokenizers.Tokenizer:
        """The backend for text that other text precedes."""
        return _continuing(self.backend, within_text=True)

    def _encode(self, text: str, backend: tokenizers.Tokenizer) -> tuple[list[int], list[Span]]:
        """Ids of a text and the characters of it that each stands for; some models leave out white space there."""
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError:
            _check_surrogates(text)
            raise
        if self._control_ids.isdisjoint(encoding.ids):
            return encoding.ids, encoding.offsets
        # A model may have its control tokens among its ordinary pieces and find them in text. Halves of one are text.
        found = list(zip(encoding.ids, encoding.offsets, strict=True))
        spans = [span for token_id, span in found if token_id in self._control_ids]
        cuts = [(start + end) // 2 for start, end in spans if end - start > 1]
        if not cuts:
            kept = [(token_id, span) for token_id, span in found if token_id not in self._control_ids]
            return [token_id for token_id, _ in kept], [span for _, span in kept]
        ids: list[int] = []
        places: list[Span] = []
        for start, end in pairwise((0, *cuts, len(text))):
            part_ids, part_places = self._encode(text[start:end], self._within_text if start else backend)
            ids += part_ids
            places += [(start + begin, start + stop) for begin, stop in part_places]
        return ids, places

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def token_bytes(self) -> list[bytes | None]:
        """By id, the bytes that a token adds to the text; None for control tokens and unused ids.

        A decoder that drops the space before the first word of a text does so all the same.

        Raises:
            ValueError: the tokenizer decodes in another way than token by token into bytes.
        """
        steps = _steps(self.backend.decoder, "decoders")
        kinds = {step["type"] for step in steps}
        if "ByteLevel" in kinds:
            spell: Callable[[str], bytes] = _spell_byte_level
        elif kinds & {"ByteFallback", "Metaspace"}:
            spell = _spell_byte_fallback
        else:
            raise ValueError(f"the tokenizer's decoder {sorted(kinds)} is neither byte-level nor byte-fallback")
        table: list[bytes | None] = [None] * self.vocab_size
        for token, token_id in self.backend.get_vocab(with_added_tokens=False).items():
            table[token_id] = spell(token)
        for token_id, added in self.backend.get_added_tokens_decoder().items():
            table[token_id] = None if added.special else added.content.encode()
        for token_id in self._control_ids | self.eos_ids:
            table[token_id] = None
        return table

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation of `{"role", "content"}` messages.

        Special tokens written inside a message stay plain text, in whichever field, whatever the template is (with
        the limits that `llama.chat_template.ChatTemplate` names).

        Raises:
            ChatTemplateError: there is no template, it does not compile, or it refuses the messages.
            ValueError: as `encode`.
        """
        template, names = self._chat()
        ids: list[int] = []
        for piece, is_control in template.render(
            messages, add_generation_prompt=add_generation_prompt, special_tokens=names
        ):
            for part_ids, _, _ in self._encode_piece(piece, is_control, first=not ids):
                ids += part_ids
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, now: datetime | None = None
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, and which of them an assistant wrote: those to learn from.

        The ids are those of `apply_chat_template` without a generation prompt. The assistant's are what stands in the
        template's `{% generation %}` blocks; without such blocks, what it puts behind its prompt for an answer, the
        control token that ends the turn included. A token that belongs to both sides counts as the assistant's.

        Args:
            now: what a template that asks for the date is told, so that the ids depend on no clock.

        Raises:
            ChatTemplateError: as `apply_chat_template`; or the template does not let the answers be told.
            ValueError: as `encode`.
        """
        template, names = self._chat()
        pieces, spans = template.render_answered(messages, special_tokens=names, now=now or datetime.now())
        answered = bytearray(sum(len(piece) for piece, _ in pieces))
        for begin, end in spans:
            answered[begin:end] = b"\1" * (end - begin)
        ids: list[int] = []
        learned: list[bool] = []
        place = 0
        for piece, is_control in pieces:
            for part_ids, offsets, at in self._encode_piece(piece, is_control, first=not ids):
                ids += part_ids
                previous = 0
                for begin, end in offsets:
                    if begin == end:  # the white space before it, or something that the tokenizer puts in
                        begin = min(previous, begin)
                    learned.append(answered.find(1, place + at + begin, place + at + max(end, begin + 1)) >= 0)
                    previous = end
            place += len(piece)
        return ids, learned

    def _chat(self) -> tuple[ChatTemplate, dict[str, str]]:
        """The template, and the special tokens under the names that it knows them by."""
        if self._template is None:
            raise ChatTemplateError("the model has no chat template; use /v1/completions or add chat_template.jinja")
        return self._template, {name: token for name, token in self._names.items() if token}

    def _encode_piece(self, piece: str, is_control: bool, first: bool) -> Iterator[tuple[list[int], list[Span], int]]:
        """`_encode` of a piece of a rendered conversation by its `stretches`, and where in it each begins."""
        if is_control:
            yield [self._special[piece]], [(0, len(piece))], 0
            return
        backend, at = self.backend if first else self._continuing, 0
        for stretch in stretches(piece) if piece else ():
            yield *self._encode(stretch, backend), at
            backend, at = self._within_text, at + len(stretch)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Reads a tokenizer directory, `eos_ids` from its `generation_config.json` if there is one.

        Raises:
            FileNotFoundError: there is no `tokenizer.json`.
            ValueError: no end-of-text token is named, a named token or id is not in the vocabulary, or of several chat
                templates none is the default.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no tokenizer.json; give a directory saved by a fast tokenizer")
        config_path = directory / "tokenizer_config.json"
        config = _read_settings(config_path)
        names = {key: _token_name(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        eos_token = names["eos_token"]
        if eos_token is None:
            raise ValueError(f"{config_path} names no eos_token; generation would never end, add it")
        template_path = directory / "chat_template.jinja"
        template = template_path.read_text("utf-8") if template_path.is_file() else _template_of(config, config_path)
        ends = _read_settings(directory / GENERATION_CONFIG_FILE).get("eos_token_id")
        return cls(
            tokenizers.Tokenizer.from_file(str(path)),
            bos_token=names["bos_token"],
            eos_token=eos_token,
            pad_token=names["pad_token"],
            chat_template=template,
            eos_ids=ends if isinstance(ends, list) else [] if ends is None else [ends],
        )

    def save(self, directory: str | Path) -> None:
        """Writes the directory that `load` and `transformers.AutoTokenizer` read.

        `eos_ids` go into a model's `generation_config.json`, which llama/hf.py writes.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._names,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if self.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self.chat_template, "utf-8")


def stretches(text: str) -> Iterator[str]:
    """The text in parts of at most 2¹⁸ characters, which can be encoded one by one.

    A part ends where a letter or digit is followed by a space or line feed. No match of GPT-2's pattern has such a
    place inside it or depends on what is behind it, so a tokenizer that cuts text by that pattern finds the same ids
    in the parts as in the whole; so do those that cut by white space, or as GPT-4's and Llama 3's do. Where there is no
    such place in so many characters, as in Chinese, a part ends between any two of them: the same in every run, but a
    token that would reach across becomes others that decode to the same text.
    """
    begin = 0
    while len(text) - begin > _STRETCH_CHARS:
        end = begin + _STRETCH_CHARS
        places = (at for at in range(end, begin, -1) if text[at] in " \n" and text[at - 1].isalnum())
        end = next(places, end)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty if there is none."""
    try:
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object")
    return settings


def _template_of(config: dict[str, Any], path: Path) -> str | None:
    """The chat template in tokenizer_config.json: a text, or the one called "default" of a list."""
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    entries = [entry for entry in template if isinstance(entry, dict)] if isinstance(template, list) else []
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    default = named.get("default")
    if not isinstance(default, str):
        raise ValueError(
            f"{path}: chat_template holds no template named default, but {sorted(named)}; name one of them so, or put "
            "it into chat_template.jinja"
        )
    return default


def _encode_all(texts: list[str], backend: tokenizers.Tokenizer) -> list[list[int]]:
    """Ids of each text as the model finds them, control tokens that it keeps among its pieces included."""
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError:
        for text in texts:
            _check_surrogates(text)
        raise


def _joined(lists: Sequence[Sequence[int]], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """All numbers one after the other, and how many each list has."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return np.fromiter(chain.from_iterable(lists), dtype, int(lengths.sum())), lengths


def _check_surrogates(text: str) -> None:
    try:
        str.encode(text)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half of a surrogate pair, {text[error.start]!r} at {error.start}, which stands for no "
            "character; remove it"
        ) from error


def _unknown_token(backend: tokenizers.Tokenizer) -> str | None:
    """What the model makes of text that it has no pieces for, if it has a token for that."""
    if not isinstance(backend.model, tokenizers.models.Unigram):
        return backend.model.unk_token
    unknown_id = json.loads(backend.model.__getstate__())["unk_id"]
    return None if unknown_id is None else backend.id_to_token(unknown_id)


def _continuing(backend: tokenizers.Tokenizer, within_text: bool = False) -> tokenizers.Tokenizer:
    """`backend` for text that does not begin a sequence: without the "▁" that some put in front of the first word.

    With `within_text` also without what some put in front of every text, for one that goes on in the middle."""
    normalizers = _steps(backend.normalizer, "normalizers")
    pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
    kept = [step for step in normalizers if not (within_text and step["type"] == "Prepend")]
    changed = [_without_prefix(step, within_text) for step in pre_tokenizers]
    if (kept, changed) == (normalizers, pre_tokenizers):
        return backend
    state = json.loads(backend.to_str())
    state["normalizer"] = {"type": "Sequence", "normalizers": kept}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": changed}
    continuing = tokenizers.Tokenizer.from_str(json.dumps(state))
    continuing.encode_special_tokens = True
    return continuing


def _without_prefix(pre_tokenizer: dict[str, Any], within_text: bool) -> dict[str, Any]:
    if pre_tokenizer.get("prepend_scheme") in ("first", "always" if within_text else "first"):
        return pre_tokenizer | {"prepend_scheme": "never"}
    if within_text and "add_prefix_space" in pre_tokenizer:
        return pre_tokenizer | {"add_prefix_space": False}
    return pre_tokenizer


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, or of those that a sequence consists of; none of None."""
    state = None if part is None else json.loads(part.__getstate__())
    return [] if state is None else state.get(inner, [state])


def _spell_byte_level(token: str) -> bytes:
    """GPT-2's spelling, in which a character stands for each byte: itself, or one from U+0100 on in order of the bytes
    that are not printable. Where one stands for none, the text is as it is."""
    if any(character not in _BYTE_OF for character in token):
        return token.encode()
    return bytes(_BYTE_OF[character] for character in token)


def _spell_byte_fallback(token: str) -> bytes:
    """SentencePiece's, with "▁" for a space and `<0x0A>` for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + at): byte for at, byte in enumerate(_UNPRINTABLE)}


def _token_name(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string, or an object with its `content`."""
    return value.get("content") if isinstance(value, dict) else value
