"""Chat templates: Jinja text that turns a conversation into the text a model was trained on, as transformers has them.

A rendered conversation mixes the template's text, in which control tokens count, with the messages', in which they are
text. To tell them apart a conversation is rendered twice: once as it is, and once with the characters by which control
tokens begin and end replaced in all that the messages hold. If what comes out differs in more than that, the template
looks for such characters in messages; then they are disguised less.

Which text an assistant wrote, for training on nothing else, a template says by `{% generation %}` blocks. One without
them is asked: what it puts behind the prompt for an answer, once there is one, is the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from llama.template_sandbox import TemplateSandbox

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


Pieces: TypeAlias = list[tuple[str, bool]]
"""Text in pieces: each a control token (True) or text (False)."""
Span: TypeAlias = tuple[int, int]
"""Characters from the first up to, and without, the second."""

_MOST_ASKED = 4096  # messages; asking after each answer costs the square of them
_MARKS = ("begin_of_generation", "end_of_generation")  # variables of a template: what stands around such a block


class ChatTemplateError(ValueError):
    """The messages do not fit the chat template, it is broken, or there is none."""


class ChatTemplate:
    """A template and the control tokens that its text makes.

    A control token is one whose first and last characters are the template's, where they are no letters or digits:
    `'<|' + message['role'] + '|>'` may make one. Where a template looks for control tokens in messages, keeps those
    that it finds and drops as many of its own, the found ones count: that is taken for its intention.

    Args:
        text: Jinja. If it does not compile, only `render` fails: without chats the model is still of use.
        control_tokens: at least one.
    """

    def __init__(self, text: str, control_tokens: Collection[str]) -> None:
        self._text = text
        self._tokens = sorted(control_tokens, key=len, reverse=True)
        self._any_token = _any_of(self._tokens)
        self._edges = sorted({token[0] for token in self._tokens} | {token[-1] for token in self._tokens})
        environment = TemplateSandbox(extensions=["jinja2.ext.loopcontrols", _Generation])
        self._sandbox = environment
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        self._compiled: Template | Exception
        self._marks_generation = False
        sought: set[str] = set()
        try:
            parsed = environment.parse(text)
            self._marks_generation = any(name.name == _MARKS[0] for name in parsed.find_all(nodes.Name))
            constants = {node.value for node in parsed.find_all(nodes.Const)}
            sought = _harmless({constant for constant in constants if isinstance(constant, str)}, self._tokens)
            self._compiled = environment.guarded(parsed)
        except Exception as error:  # Jinja's own, and what Python thinks of the code that Jinja makes
            self._compiled = error
        # Letters stay: the template has to know its fields' names again.
        edges = [edge for edge in self._edges if not edge.isalnum()]
        self._telling = re.compile(f"(?P<token>{self._any_token})|(?P<sought>{_any_of(sought)})|{_any_of(edges)}")

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, tuple[str, ...]]]:
        """A compiled template is not for another process, which compiles the text again."""
        return ChatTemplate, (self._text, tuple(self._tokens))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, special_tokens: Mapping[str, str]
    ) -> Pieces:
        """The conversation in pieces.

        Args:
            messages: `{"role", "content"}` and whatever else the template knows.
            special_tokens: what `bos_token` and its kin stand for in the template.

        Raises:
            ChatTemplateError: the template does not compile, it refuses the messages, or it treats them so that a
                control token which they spell cannot be told from its own.
        """
        renderer = self._renderer(special_tokens, datetime.now())
        pieces, _ = self._tell_apart(messages, renderer, add_generation_prompt)
        return pieces

    def render_answered(
        self, messages: Sequence[Mapping[str, Any]], *, special_tokens: Mapping[str, str], now: datetime
    ) -> tuple[Pieces, list[Span]]:
        """The conversation in pieces, without a prompt for an answer, and which of its characters an assistant wrote:
        what it says, and the control token that ends its turn.

        Args:
            now: for templates that ask for the date.

        Raises:
            ChatTemplateError: as `render`; or the template has no `{% generation %}` blocks, and does not put the
                answers behind its prompt for them, or there are too many messages to ask it after each.
        """
        renderer = self._renderer(special_tokens, now)
        if self._marks_generation:
            return self._tell_apart(messages, renderer, False, marked=True)
        pieces, _ = self._tell_apart(messages, renderer, False)
        return pieces, _answers(messages, pieces, renderer)

    def _renderer(self, special_tokens: Mapping[str, str], now: datetime) -> _Renderer:
        if isinstance(template := self._compiled, Exception):
            line = f" in line {template.lineno}" if isinstance(template, TemplateSyntaxError) else ""
            raise ChatTemplateError(
                f"the chat template has an error{line}: {template}; correct it, in chat_template.jinja or in "
                "tokenizer_config.json's chat_template"
            ) from template
        variables = {**special_tokens, "tools": None, "documents": None, "strftime_now": now.strftime}
        return _Renderer(template, self._sandbox, variables)

    def _tell_apart(
        self,
        messages: Sequence[Mapping[str, Any]],
        renderer: _Renderer,
        add_generation_prompt: bool,
        marked: bool = False,
    ) -> tuple[Pieces, list[Span]]:
        """The conversation in pieces and, if its `{% generation %}` blocks are to be marked, what stands in them."""
        _check_messages(messages)
        plain = _map_strings(list(messages), str)
        text = renderer(plain, add_generation_prompt)
        disguise = _Disguise(self._edges, text)
        marks = disguise.marks if marked else ("", "")
        disguised_texts: list[str] = []
        for hide in (disguise.mask, disguise.fence):
            try:
                conversation = _map_strings(plain, partial(self._telling.sub, hide))
                disguised_text, spans = disguise.without_marks(renderer(conversation, add_generation_prompt, marks))
            except ChatTemplateError:
                disguised_text, spans = "", []
            if disguise.removed(disguised_text) == text:
                return self._pieces(disguised_text, disguise), spans
            disguised_texts.append(disguised_text)
        # The template changes the text by what it finds in the messages. If no control token is added, they made none.
        pieces, masked_pieces = (self._pieces(each, disguise) for each in (text, disguised_texts[0]))
        marked_text, spans = (
            disguise.without_marks(renderer(plain, add_generation_prompt, marks)) if marked else (text, [])
        )
        if marked_text != text:
            raise ChatTemplateError(
                "the chat template changes what its {% generation %} blocks give; take the blocks out, or what changes "
                "them"
            )
        if _controls(pieces) == _controls(masked_pieces):
            return pieces, spans
        raise ChatTemplateError(
            f"the messages spell a control token of the model, such as {self._tokens[0]!r}, in a place where the chat "
            "template changes the text; take it out"
        )

    def _pieces(self, text: str, disguise: _Disguise) -> Pieces:
        fenced = f"{disguise.begin}(?:{self._any_token}){disguise.end}"
        pieces: Pieces = []
        start = 0
        for match in re.finditer(f"{fenced}|(?P<control>{self._any_token})", text):
            if match["control"]:
                pieces += [(disguise.removed(text[start : match.start()]), False), (match["control"], True)]
                start = match.end()
        return [*pieces, (disguise.removed(text[start:]), False)]


@dataclass(frozen=True)
class _Renderer:
    template: Template
    sandbox: TemplateSandbox
    variables: dict[str, Any]

    def __call__(self, messages: Sequence[Any], add_generation_prompt: bool, marks: tuple[str, str] = ("", "")) -> str:
        """The template's text; `marks` surround its `{% generation %}` blocks. Raises ChatTemplateError."""
        variables = {**self.variables, **dict(zip(_MARKS, marks, strict=True)), **self.sandbox.variables()}
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a template may fail in any way Jinja's sandbox can
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from error


def _answers(messages: Sequence[Mapping[str, Any]], pieces: Pieces, renderer: _Renderer) -> list[Span]:
    """Where the assistant's messages stand in the text of `pieces`: each from the end of the prompt for it on, up to
    the control token that ends it, or to where the conversation so far ends."""
    if len(messages) > _MOST_ASKED:
        raise ChatTemplateError(
            f"{len(messages)} messages are more than the {_MOST_ASKED} of which a chat template without "
            "{% generation %} blocks can be asked what the assistant wrote; put such blocks around it in the template, "
            "or split the conversation"
        )
    text = "".join(piece for piece, _ in pieces)
    plain = _map_strings(list(messages), str)
    spans: list[Span] = []
    for index, message in enumerate(plain):
        if message.get("role") != "assistant":
            continue
        prompt, answered = renderer(plain[:index], True), renderer(plain[: index + 1], False)
        for begin, whole, what in (
            (prompt, answered, "does not put it behind the prompt for it"),
            (answered, text, "gives it another text when messages follow"),
        ):
            if not whole.startswith(begin):
                raise ChatTemplateError(
                    f"messages[{index}]: the chat template {what}, so what the assistant wrote cannot be told; put "
                    "{% generation %} blocks around it in the template"
                )
        spans.append((len(prompt), _end_of_turn(pieces, len(prompt), len(answered))))
    return spans


def _end_of_turn(pieces: Pieces, begin: int, end: int) -> int:
    """`end`, but before it the white space behind a last control token: nobody is asked to write that."""
    place = ends = 0
    blank = False  # whether all behind `ends` is white space
    for piece, is_control in pieces:
        inside = piece[max(begin - place, 0) : max(end - place, 0)]
        place += len(piece)
        if is_control and inside:
            ends, blank = min(place, end), True
        elif inside.strip():
            blank = False
    return ends if blank else end


class _Disguise:
    """How what messages hold is hidden from the search for control tokens, by characters that are not in `text`.

    A mask puts one character in the place of another, so that a template may measure and slice. A fence surrounds a
    control token, so that a template may look for it.
    """

    def __init__(self, edges: Sequence[str], text: str) -> None:
        free = (character for character in map(chr, range(0xF0000, 0x110000)) if character not in text)
        self.begin, self.end, begin, end, *masks = islice(free, 4 + len(edges))
        self.marks = begin, end
        """What stands around a `{% generation %}` block."""
        self._masks = str.maketrans(dict(zip(edges, masks, strict=True)))
        self._removal = str.maketrans({**dict(zip(masks, edges, strict=True)), self.begin: "", self.end: ""})

    def mask(self, match: re.Match[str]) -> str:
        return match[0] if match["sought"] else match[0].translate(self._masks)

    def fence(self, match: re.Match[str]) -> str:
        return self.begin + match[0] + self.end if match["token"] else self.mask(match)

    def removed(self, text: str) -> str:
        return text.translate(self._removal)

    def without_marks(self, text: str) -> tuple[str, list[Span]]:
        """The text, disguised as it was, and what stood between marks, in characters of the text undisguised."""
        kept: list[str] = []
        spans: list[Span] = []
        place = depth = begin = 0
        for part in re.split(f"([{''.join(self.marks)}])", text):
            if part == self.marks[0]:
                begin = begin if depth else place
                depth += 1
            elif part == self.marks[1] and depth:
                depth -= 1
                if not depth:
                    spans.append((begin, place))
            elif part not in self.marks:
                kept.append(part)
                place += len(self.removed(part))
        return "".join(kept), [*spans, (begin, place)] if depth else spans


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` says which text an assistant wrote: it comes between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(mark, "load")], lineno=line) for mark in _MARKS)
        return nodes.Scope([begin, *body, end], lineno=line)


def _harmless(constants: set[str], tokens: Sequence[str]) -> set[str]:
    """Those that messages may keep as they are, for the template to find: they share nothing with a token."""
    heads = {token[:n] for token in tokens for n in range(1, len(token) + 1)}
    tails = {token[n:] for token in tokens for n in range(len(token))}

    def is_harmless(constant: str) -> bool:
        places = range(len(constant))
        return not (
            any(constant[place:] in heads or constant[: place + 1] in tails for place in places)
            or any(constant in token or token in constant for token in tokens)
        )

    return {constant for constant in constants if is_harmless(constant)}


def _controls(pieces: list[tuple[str, bool]]) -> list[str]:
    return [piece for piece, is_control in pieces if is_control]


def _any_of(strings: Collection[str]) -> str:
    """A pattern for the longest of them; for nothing if there are none."""
    return "|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)"


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where Jinja's own filter writes `<` for HTML."""
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
