"""Conversations and preferences: which records are ones, and the one text that stands for each.

    chat          [{"role", "content"}, ...], or ShareGPT's [{"from", "value"}, ...]
    preference    {"prompt", "chosen", "rejected"}, each a text or a list of messages

A message may have further keys, such as `name` or `tool_calls`; they stay. A key whose value is null is absent: tables
have every key in every row. Everything that is refused is a ValueError of one line, without the record's own text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]
"""`role`, `content`, and whatever else a chat template may know."""
Preference: TypeAlias = dict[str, str | list[Message]]

_DEEPEST = 100  # levels; what reads records later recurses into them
ROLES = ("system", "user", "assistant", "tool")

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def parse_chat(value: object) -> list[Message]:
    """The messages of a conversation that somebody can learn from: an assistant speaks in it. Raises ValueError."""
    messages = _messages(value, "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages has none of the role assistant; there is nothing to learn")
    return messages


def parse_preference(value: object) -> Preference:
    """A prompt and two answers to it, of which one is better; further keys are left out. Raises ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"the record is of type {type(value).__name__}; give prompt, chosen and rejected")
    record: Preference = {}
    for key in ("prompt", "chosen", "rejected"):
        side = value.get(key)
        if side is None:
            raise ValueError(f"{key} is missing; give a text or messages")
        if side == "":
            raise ValueError(f"{key} is empty; give a text or messages")
        record[key] = side if isinstance(side, str) else _messages(side, key)
    if record["chosen"] == record["rejected"]:
        raise ValueError("chosen and rejected are equal; there is nothing to prefer")
    return record


def canonical(record: list[Message] | Preference) -> str:
    """JSON without white space, keys sorted, characters as they are: equal records have equal texts.

    Raises ValueError for what JSON or UTF-8 cannot hold: dates, bytes, NaN, half of a surrogate pair; and for lists and
    objects more than a hundred levels deep.
    """
    if _is_deeper(record, _DEEPEST):
        raise ValueError(f"the record has lists or objects more than {_DEEPEST} levels deep; flatten it")
    try:
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the record has half of a surrogate pair, which stands for no character") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the record cannot be JSON: {error}") from error
    return text


def chat_contents(text: str) -> str:
    """What is said in a conversation, given as `canonical` wrote it, a line feed between its messages."""
    return "\n".join(message["content"] for message in json.loads(text) if message.get("content"))


def _messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a list of messages")
    if not value:
        raise ValueError(f"{name} is empty; give at least one message")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(value: object, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is of type {type(value).__name__}; give role and content")
    message: Message = {key: item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise ValueError(f"{name}.from={_shown(speaker)} is unknown; use one of {', '.join(_SHAREGPT_ROLES)}")
        message["role"] = role
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if role is None:
        raise ValueError(f"{name}.role is missing; use one of {', '.join(ROLES)}")
    if role not in ROLES:
        raise ValueError(f"{name}.role={_shown(role)} is unknown; use one of {', '.join(ROLES)}")
    # Calls of tools may be all that an assistant says.
    silent = "content" not in message and role == "assistant" and message.get("tool_calls")
    if not silent and not isinstance(message.get("content"), str):
        kind = type(message["content"]).__name__ if "content" in message else None
        raise ValueError(f"{name}.content is {f'of type {kind}' if kind else 'missing'}; give a text")
    return message


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, Mapping | list | tuple):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
