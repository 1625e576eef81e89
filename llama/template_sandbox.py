"""Where chat templates run: without Python, for seconds at most, and in bounded memory.

They come with models from outside, so they are programs of strangers. Jinja's sandbox keeps them from Python, but not
from computing for ever or filling the memory. So every turn of a loop and every call of a macro looks at the clock, and
whatever makes a text out of others is refused before it makes one that is too long.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 5.0
MOST_CHARS = 1 << 26
"""Of one text or list that a template makes."""

_MOST_BITS = 1 << 20  # of a number
_ITEM = 64  # characters that an item of a list counts for

_WIDE = re.compile(r"[0-9]{7}|\*")
_GROWING = ("center", "format", "indent", "join", "replace", "batch", "slice", "wordwrap", "urlize", "tojson")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers has it, for templates that nobody here has read."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        """Jinja's way to the text of a template or of a macro."""
        kept: list[str] = []
        size = 0
        for part in parts:
            size += len(part)
            _check(size)
            kept.append(part)
        return "".join(kept)

    def __init__(self, **settings: Any) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, **settings)
        self.globals.pop("lipsum")
        # Names that no template can know, and so not replace.
        self._tick = f"_tick_{secrets.token_hex(8)}"
        self._join = f"_join_{secrets.token_hex(8)}"
        for name in _GROWING:
            self.filters[name] = _bounded(self.filters[name])

    def guarded(self, tree: nodes.Template) -> Template:
        """A parsed template, made so that `variables` can stop it."""
        return self.from_string(_Guards(self._tick, self._join).visit(tree))

    def variables(self) -> dict[str, Callable[..., Any]]:
        """What a guarded template must be rendered with: the time begins now."""
        deadline = time.monotonic() + MOST_SECONDS

        def tick() -> str:
            if time.monotonic() > deadline:
                raise SecurityError(f"it takes longer than {MOST_SECONDS:g} s")
            return ""

        def join(*parts: Any) -> str:
            _check(sum(len(part) if isinstance(part, str) else _ITEM for part in parts))
            return str_join(parts)

        return {self._tick: tick, self._join: join}

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Jinja's way to every function and method that a template calls."""
        # The sandbox wraps `str.format` into a function of its own.
        receiver = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(receiver, str | bytes | list | tuple):
            _check_call(receiver, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Jinja's way to the operators of `intercepted_binops`."""
        if operator == "+":
            _check(_length(left) + _length(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
            else:
                _check(_length(left) * _length(right))
        elif operator == "%" and isinstance(left, str):
            _check_call(left, (right,), {})
        return super().call_binop(context, operator, left, right)


class _Guards(NodeTransformer):
    """Puts the clock into every loop and macro, and our own joining in the place of `~`."""

    def __init__(self, tick: str, join: str) -> None:
        self._tick = tick
        self._join = join

    def _visit_body(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call(self._tick, [], node.lineno)], lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _visit_body  # noqa: N815 - names of Jinja

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call(self._join, node.nodes, node.lineno)


def _call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load", lineno=line), args, [], None, None, lineno=line)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with the marks by which Jinja knows what to pass
    def bounded(*args: Any, **kwargs: Any) -> Any:
        known = [arg for arg in args if isinstance(arg, str | int | list | tuple | Mapping)]
        if known:
            _check_call(known[0], known[1:], kwargs)
        return function(*args, **kwargs)

    return bounded


def _check_call(receiver: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """What a text is made of: as many parts as it has, times what is put in their place or between them."""
    if isinstance(receiver, str) and ("%" in receiver or "{" in receiver) and _WIDE.search(receiver):
        raise SecurityError("a width in a format is too large")
    size = max(_length(receiver), 1)
    for arg in (*args, *kwargs.values()):
        size *= max(_length(arg), 1)
    _check(size)


def _length(value: Any) -> int:
    """Characters of a text, or of all texts in a list and its own; a number's value, for it may be a width."""
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, str | bytes | Mapping):
        return len(value)
    if isinstance(value, list | tuple):
        return _ITEM * len(value) + sum(len(item) for item in value if isinstance(item, str))
    return 1


def _check(size: int) -> None:
    if size > MOST_CHARS:
        raise SecurityError(f"it makes more than {MOST_CHARS} characters of one text")


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise SecurityError(f"it makes a number of more than {_MOST_BITS} bits")
