"""Documents between the stages: what a part file holds, and which of its rows stay.

    {split}/00-00000-000.parquet    source number, task number, file number of the task
        id          string          xxh3_128 of the text, hexadecimal
        text        large_string    for kind chat and preference the record as canonical JSON
        bytes       int64           of the text as UTF-8
        path        string          file it comes from, by its URI
        offset      int64           where in that file it begins: a byte, or a row of a table
        metadata    string          the source's metadata columns as a JSON object, or empty

A part file holds documents of one source and one split, in the order of the source, and at most about
`data.part_bytes` of text. Ingest writes it, once. Dedup drops rows of it by listing them in a file; nobody copies the
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from cluster.artifact import Artifact, CorruptArtifact
from cluster.storage import FileEntry, NotFound, StorageError, Store

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

Kind = Literal["text", "chat", "preference"]

PARTS = "parts"
"""Where in the metadata of `ingest` the list of part files stands."""
KEPT = "kept"
"""Where in the metadata of `dedup` the list of how much stays of each of them stands."""
DROPPED = "dropped.parquet"
"""The file of `dedup` that says which rows do not stay: `part` (number in the list of part files), `row`; ascending."""

_ROWS = 1024  # Python objects made at once
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("bytes", pa.int64()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True)
class Document:
    """A text and where it comes from; `metadata` is JSON or empty."""

    id: str
    text: str
    path: str
    offset: int
    metadata: str = ""


def document_id(text: str) -> str:
    """xxh3_128 of the text as UTF-8, hexadecimal: equal texts have equal ids."""
    return xxhash.xxh3_128_hexdigest(text.encode())


@dataclass(frozen=True)
class Part:
    """A part file as ingest wrote it: `documents` rows with `bytes` of text."""

    path: str
    source: int
    split: Split
    kind: Kind
    documents: int
    bytes: int


@dataclass(frozen=True)
class KeptPart(Part):
    """A part file and the rows of it that are dropped, ascending; `documents` and `bytes` count those that stay."""

    dropped: tuple[int, ...] = ()


def write_part(
    output: Store, path: str, source: int, split: Split, kind: Kind, documents: Sequence[Document]
) -> tuple[FileEntry, Part]:
    """The documents as one file."""
    sizes = [len(document.text.encode()) for document in documents]
    table = pa.table(
        {
            "id": [document.id for document in documents],
            "text": [document.text for document in documents],
            "bytes": sizes,
            "path": [document.path for document in documents],
            "offset": [document.offset for document in documents],
            "metadata": [document.metadata for document in documents],
        },
        schema=_SCHEMA,
    )
    return write_table(output, path, table), Part(path, source, split, kind, len(documents), sum(sizes))


def write_table(output: Store, path: str, table: pa.Table) -> FileEntry:
    """A table as a Parquet file, which `read_table` reads."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return output.write_bytes(path, buffer.getvalue().to_pybytes())


def read_table(files: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A part file, dropped rows included, or some of its columns; or another file that `write_table` wrote.

    Raises CorruptArtifact if it is not what was written: what is made of it would be committed, and look whole."""
    with files.open_input(path) as source:
        try:
            # With threads, pyarrow may abort an interpreter that ends soon after it read a Python file.
            file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
            chosen = list(columns) if columns is not None else file.schema_arrow.names
            table = file.read(chosen, use_threads=False).select(chosen)
            if len(table) != file.metadata.num_rows:  # the pages' headers have no checksum
                raise pa.ArrowInvalid(f"{len(table)} rows of {file.metadata.num_rows}")
        except StorageError:
            raise
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            remedy = "if it is damaged, delete the artifact and run its stage again"
            raise CorruptArtifact(f"{files.uri}: {path} cannot be read ({error}); {remedy}") from error
    return table


def read_part(files: Store, part: KeptPart) -> Iterator[Document]:
    """The documents of a part that stay, in order."""
    table = read_table(files, part.path, ("id", "text", "path", "offset", "metadata"))
    if part.dropped:
        stays = np.ones(len(table), bool)
        stays[list(part.dropped)] = False
        table = table.filter(pa.array(stays))
    for batch in table.to_batches(max_chunksize=_ROWS):
        yield from (Document(*row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))


def ingest_parts(ingest: Artifact) -> list[Part]:
    """The part files of a committed `ingest` artifact, in the order of the corpus. Raises NotFound."""
    return [Part(**part) for part in stage_metadata(ingest)[PARTS]]


def kept_parts(ingest: Artifact, dedup: Artifact, split: Split) -> list[KeptPart]:
    """What the two stages leave of a split, in the order of the corpus; a part of which nothing stays is left out.

    Raises NotFound if one of them is not committed."""
    parts, kept = ingest_parts(ingest), stage_metadata(dedup)[KEPT]
    table = read_table(dedup.files, DROPPED, ("part", "row"))
    rows = np.split(table["row"].to_numpy(), np.searchsorted(table["part"].to_numpy(), range(1, len(parts))))
    found = [
        KeptPart(**(asdict(part) | stays), dropped=tuple(dropped.tolist()))
        for part, stays, dropped in zip(parts, kept, rows, strict=True)
        if part.split == split and stays["documents"]
    ]
    return found


def kept_entry(documents: int, size: int) -> dict[str, int]:
    """An element of `KEPT`, one for each of `ingest_parts`: how much stays of it, in documents and bytes."""
    return {"documents": documents, "bytes": size}


def stage_metadata(artifact: Artifact) -> dict[str, Any]:
    """What the stage says of a committed artifact. Raises NotFound."""
    manifest = artifact.manifest()
    if manifest is None:
        raise NotFound(f"{artifact.store.uri}: nothing is committed here; run the stage that writes it")
    return manifest.metadata
