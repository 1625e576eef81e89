"""Chat templates: Jinja text that turns a conversation into the text a model was trained on, as transformers has them.

A rendered conversation mixes the template's text, in which control tokens count, with the users', in which they are
text. To tell them apart a conversation is rendered twice: once as it is, and once with invisible marks in everything
the messages hold. What the marks leave when taken away must be the first text, else the template looked into what it
was not to notice, and less is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('messages.role=' + message['role'] + ' is unknown; use system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class ChatTemplateError(ValueError):
    """The messages do not fit the chat template, it is broken, or there is none."""


class ChatTemplate:
    """A template and the control tokens that its text makes.

    A control token is one whose first and last character are the template's; `'<|' + message['role'] + '|>'` may make
    them. A template that measures or slices its messages, or writes them in ASCII, gets fewer marks: there, halves of a
    control token that it joins by removing what stood between them become the token.

    Args:
        text: Jinja. One that does not compile is an error when rendered, not here: a model is of use without chats.
        control_tokens: at least one.
    """

    def __init__(self, text: str, control_tokens: Collection[str]) -> None:
        self._tokens = sorted(control_tokens, key=len, reverse=True)
        self._any_token = "|".join(map(re.escape, self._tokens))
        self._edges = {token[0] for token in self._tokens} | {token[-1] for token in self._tokens}
        self._error: Exception | None = None
        self._template = Template("")
        # A sandbox without access to Python: templates come with models from outside.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        self._sought: list[str] = []
        try:
            self._template = environment.from_string(text)
            constants = environment.parse(text).find_all(nodes.Const)
            self._sought = [
                value for node in constants if isinstance(value := node.value, str) and self._harmless(value)
            ]
        except Exception as error:  # Jinja's own, and what Python thinks of the code that Jinja makes
            self._error = error

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, special_tokens: Mapping[str, str]
    ) -> list[tuple[str, bool]]:
        """The conversation in pieces: each a control token (True) or text (False).

        Args:
            messages: `{"role", "content"}` and whatever else the template knows.
            special_tokens: what `bos_token` and its kin stand for in the template.

        Raises:
            ChatTemplateError: the template does not compile, it refuses the messages, or it cuts a control token that
                they hold.
        """
        if self._error is not None:
            line = f" in line {self._error.lineno}" if isinstance(self._error, TemplateError) else ""
            raise ChatTemplateError(
                f"the chat template (chat_template.jinja, or chat_template in tokenizer_config.json) has an error{line}: "
                f"{self._error}; correct it"
            ) from self._error
        _check_messages(messages)
        now = datetime.now()
        variables = {
            **special_tokens,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
        }

        def rendered(conversation: Any) -> str:
            try:
                return self._template.render(messages=conversation, **variables)
            except Exception as error:  # a template may fail in any way Jinja's sandbox can
                raise ChatTemplateError(f"the chat template refuses the messages: {error}") from error

        plain = _map_strings(messages, str)
        text = rendered(plain)
        marks = tuple(islice((mark for mark in map(chr, range(0xF0000, 0x110000)) if mark not in text), 3))
        for marking in (self._thorough(*marks), self._sparing(*marks)):
            marked = _map_strings(messages, marking)
            try:
                marked_text = text if marked == plain else rendered(marked)
            except ChatTemplateError:
                continue
            if re.sub(f"[{''.join(marks)}]", "", marked_text) == text:
                return list(self._pieces(marked_text, *marks))
        raise ChatTemplateError(
            "the chat template takes apart text in which the messages spell control tokens; take these out: "
            + ", ".join(sorted(token for token in self._tokens if token in str(plain)))
        )

    def _harmless(self, constant: str) -> bool:
        """Whether the template may look for this text in a message without a part of a control token being in it."""
        return not any(
            token in constant
            or constant in token
            or any(constant.endswith(token[:n]) or constant.startswith(token[-n:]) for n in range(1, len(token)))
            for token in self._tokens
        )

    def _thorough(self, begin: str, end: str, cut: str) -> Callable[[str], str]:
        """Marks control tokens, and wherever one could begin or end when the template joins texts."""
        sought = "|".join(map(re.escape, sorted(self._sought, key=len, reverse=True))) or "(?!)"
        edge = "|".join(map(re.escape, sorted(self._edges)))
        pattern = re.compile(f"(?P<token>{self._any_token})|(?P<sought>{sought})|{edge}")

        def mark(match: re.Match[str]) -> str:
            if match["token"]:
                return f"{begin}{match[0]}{end}"
            return match[0] if match["sought"] else f"{cut}{match[0]}{cut}"

        return lambda string: pattern.sub(mark, string)

    def _sparing(self, begin: str, end: str, cut: str) -> Callable[[str], str]:
        """Marks control tokens, and parts of them at the ends of a string."""
        pattern = re.compile(self._any_token)
        heads = tuple({token[:n] for token in self._tokens for n in range(1, len(token))})
        tails = tuple({token[n:] for token in self._tokens for n in range(1, len(token))})

        def marking(string: str) -> str:
            marked = pattern.sub(lambda match: f"{begin}{match[0]}{end}", string)
            return cut * string.startswith(tails) + marked + cut * string.endswith(heads)

        return marking

    def _pieces(self, marked_text: str, begin: str, end: str, cut: str) -> Iterator[tuple[str, bool]]:
        pattern = re.compile(f"{begin}(?:{self._any_token}){end}|(?P<control>{self._any_token})")
        marks = re.compile(f"[{begin}{end}{cut}]")
        start = 0
        for match in pattern.finditer(marked_text):
            if match["control"]:
                yield marks.sub("", marked_text[start : match.start()]), False
                yield match["control"], True
                start = match.end()
        yield marks.sub("", marked_text[start:]), False


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` says which text an assistant wrote; here it is the text alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As it is, where Jinja's own filter writes `<` as HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(f"messages[{index}] is of {type(message).__name__}; give role and content")
        # Calls of tools may be all that an assistant says.
        if message.get("content") is None and not message.get("tool_calls"):
            raise ChatTemplateError(f"messages[{index}].content is missing or null; give a text")


def _map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """A copy with `function` applied to every string, keys included."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, function): _map_strings(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, function) for item in value]
    return value
