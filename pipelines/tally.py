"""What became of the documents of a task, a source or a corpus: counts that add up, with a few examples of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

from pipelines.clean import RULES, Dropped
from pipelines.documents import Part
from pipelines.sources import Quarantined

Value = TypeVar("Value")

EXAMPLES = 5
"""Of what became of documents, for each rule."""
EXAMPLE_CHARS = 200
"""Of a document's text in an example."""
IN_MANIFEST = 20
"""Of what is not read; all of it is in files."""


@dataclass
class Drops:
    """Documents that one rule dropped; `bytes` of text as it was read."""

    documents: int = 0
    bytes: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Tally:
    """Every document that was read is either kept or dropped by one rule; what could not be read is quarantined.

    `bytes_in` as read, `bytes` as kept, both as UTF-8. `files` are those that a task wrote, `parts` what the part files
    among them hold.
    """

    documents_in: int = 0
    bytes_in: int = 0
    documents: int = 0
    bytes: int = 0
    dropped: dict[str, Drops] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    quarantined: int = 0
    quarantine: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def keep(self, size_in: int, size: int, changed: tuple[str, ...]) -> None:
        self._read(size_in)
        self.documents += 1
        self.bytes += size
        for rule in changed:
            self.changed[rule] = self.changed.get(rule, 0) + 1

    def drop(self, size: int, outcome: Dropped, path: str, offset: int, text: str) -> None:
        self._read(size)
        drops = self.dropped.setdefault(outcome.rule, Drops())
        drops.documents += 1
        drops.bytes += size
        if len(drops.examples) < EXAMPLES:
            excerpt = text[:EXAMPLE_CHARS]
            drops.examples.append({"path": path, "offset": offset, "value": outcome.value, "text": excerpt})

    def put_in_quarantine(self, item: Quarantined) -> None:
        self.quarantined += item.records
        if len(self.quarantine) < IN_MANIFEST:
            self.quarantine.append(describe(item))

    def add(self, other: Tally) -> None:
        """Count what came after as well."""
        for name in ("documents_in", "bytes_in", "documents", "bytes", "quarantined"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for rule, drops in other.dropped.items():
            mine = self.dropped.setdefault(rule, Drops())
            mine.documents += drops.documents
            mine.bytes += drops.bytes
            mine.examples = (mine.examples + drops.examples)[:EXAMPLES]
        for rule, count in other.changed.items():
            self.changed[rule] = self.changed.get(rule, 0) + count
        self.quarantine = (self.quarantine + other.quarantine)[:IN_MANIFEST]
        self.parts += other.parts
        self.files += other.files

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        dropped = {rule: Drops(**drops) for rule, drops in value["dropped"].items()}
        return cls(**{**value, "dropped": dropped, "parts": [Part(**part) for part in value["parts"]]})

    def _read(self, size: int) -> None:
        self.documents_in += 1
        self.bytes_in += size


def in_order(by_rule: Mapping[str, Value]) -> dict[str, Value]:
    """The rules in the order in which a document meets them, not in that in which documents broke them."""
    return {rule: by_rule[rule] for rule in RULES if rule in by_rule}


def describe(item: Quarantined) -> str:
    many = f" ({item.records} records)" if item.records > 1 else ""
    return f"{item.path} at {item.offset}: {item.reason}{many}"
