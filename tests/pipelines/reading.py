"""Everything that a source yields, for the tests of the readers."""

from pathlib import Path
from typing import Any

from pipelines.data_config import SourceConfig
from pipelines.formats import Limits, Record, read_piece
from pipelines.sources import Corpus, Quarantined, find_corpus, group_pieces

LIMITS = Limits(max_document_bytes=1 << 20, max_decompressed_bytes=1 << 30)


def corpus_of(*uris: Path | str, **settings: Any) -> Corpus:
    return find_corpus([SourceConfig(uri=str(uri), **settings) for uri in uris])


def read_all(corpus: Corpus, part_bytes: int = 1 << 30, limits: Limits = LIMITS) -> list[Record | Quarantined]:
    return [
        found
        for source, pieces in zip(corpus.sources, corpus.pieces, strict=True)
        for group in group_pieces(pieces, part_bytes)
        for piece in group
        for found in read_piece(source, piece, limits)
    ]


def records(found: list[Record | Quarantined]) -> list[Record]:
    return [item for item in found if isinstance(item, Record)]


def failures(found: list[Record | Quarantined]) -> list[Quarantined]:
    return [item for item in found if isinstance(item, Quarantined)]


def texts(found: list[Record | Quarantined]) -> list[str]:
    return [record.text for record in records(found)]
