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
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from llama.chat_template import CHAT_TEMPLATE, ChatTemplate, ChatTemplateError

__all__ = ["CHAT_TEMPLATE", "GENERATION_CONFIG_FILE", "SPECIAL_TOKENS", "ChatTemplateError", "Tokenizer"]

GENERATION_CONFIG_FILE = "generation_config.json"
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
"""What a tokenizer trained by Caravan begins its vocabulary with."""


class Tokenizer:
    """A `tokenizers` backend, the special tokens' roles and a chat template.

    Args:
        backend: the tokenizer proper; it becomes this object's, with special-token parsing, truncation and padding off.
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
        return self._encode(text, self.backend)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores that `tokenizers` may use."""
        texts = list(texts)
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                _check_surrogates(text)
            raise
        return [
            encoding.ids if self._control_ids.isdisjoint(encoding.ids) else self.encode(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _encode(self, text: str, backend: tokenizers.Tokenizer) -> list[int]:
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError:
            _check_surrogates(text)
            raise
        if self._control_ids.isdisjoint(encoding.ids):
            return encoding.ids
        # A model may have its control tokens among its ordinary pieces and find them in text. Halves of one are text.
        control = [token_id in self._control_ids for token_id in encoding.ids]
        spans = [span for span, found in zip(encoding.offsets, control, strict=True) if found]
        cuts = [(start + end) // 2 for start, end in spans if end - start > 1]
        if not cuts:
            return [token_id for token_id, found in zip(encoding.ids, control, strict=True) if not found]
        first, *others = (text[start:end] for start, end in pairwise((0, *cuts, len(text))))
        ids = self._encode(first, backend)
        for other in others:
            ids += self._encode(other, self._continuing)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that form no character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

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
        if self._template is None:
            raise ChatTemplateError("the model has no chat template; use /v1/completions or add chat_template.jinja")
        names = {name: token for name, token in self._names.items() if token}
        pieces = self._template.render(messages, add_generation_prompt=add_generation_prompt, special_tokens=names)
        ids: list[int] = []
        for piece, is_control in pieces:
            if is_control:
                ids.append(self._special[piece])
            elif piece:
                ids.extend(self._encode(piece, self._continuing if ids else self.backend))
        return ids

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


def _continuing(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """`backend` for text that does not begin a sequence: without the "▁" that some put in front of the first word."""
    if backend.pre_tokenizer is None or b'"first"' not in backend.pre_tokenizer.__getstate__():
        return backend
    state = json.loads(backend.to_str())
    outer = state["pre_tokenizer"]
    for part in (outer, *outer.get("pretokenizers", ())):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    continuing = tokenizers.Tokenizer.from_str(json.dumps(state))
    continuing.encode_special_tokens = True
    return continuing


def _token_name(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string, or an object with its `content`."""
    return value.get("content") if isinstance(value, dict) else value
