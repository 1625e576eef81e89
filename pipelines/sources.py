"""Where text comes from: the files of a recipe's sources, and the pieces in which they are read.

`stdlib` is Python's own standard library on the machine: every `.py` file except tests and installed packages, one
document each. Any other source is a file, a folder (recursive), or a glob of files (pipelines/listing.py), in one of
the formats of pipelines/formats.py. Names that begin with a dot are left out, and links to folders are not followed.

A piece is what one worker reads at a time. Uncompressed plain text, JSONL and Parquet can be read from any position:
a document, a line or a row group belongs to the piece in which it begins, so that the same documents come of a file
however it is divided, and a file of any size can be read in parallel and in bounded memory. Other files are one piece.

Within a source, files are taken in the order of a hash of their path: a capped corpus is then a sample of the whole
source rather than its first folders, and still the same on every machine.
"""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

import xxhash

from cluster.storage import FileStat, NotFound, StorageError, Store
from pipelines.data_config import STDLIB, Format, SourceConfig
from pipelines.documents import Kind
from pipelines.file_types import codec_of, common_format, container_of, is_read, named_format, why_no_code, why_packed
from pipelines.listing import Listing, list_source

WHOLE_FILE_BYTES = 256 * 1024
"""A plain-text file up to here is one document."""
DOCUMENT_BYTES = 16 * 1024
"""Of which a larger one is cut."""
PARQUET_BYTES = 64 << 20
"""Parquet is not divided finer: every piece reads the file's footer, and row groups are large."""
FILES_IN_GROUP = 1024
"""Opening a remote file takes as long as reading some hundred kilobytes of it."""

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_STATE_BYTES = 1 << 20


class DataError(ValueError):
    """The data is not there, or not what the recipe needs."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of source number `source`; `size` in bytes; `path` relative to the source's folder.

    `modified` is the time of its last change in ns; 0 where a Python version says it, or for a single remote object.
    """

    source: int
    path: str
    size: int
    modified: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `begin` to `end` of a file, of which it may be divided at multiples of `unit`; 0 if not at all."""

    file: SourceFile
    begin: int
    end: int
    unit: int = 0

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Quarantined:
    """What could not be read, and why. `path` is the URI of the file; `offset` a byte, or a row of a table, of what
    was compressed the byte in the text. It stands for so many `records`, as far as that is known."""

    path: str
    offset: int
    reason: str
    records: int = 1


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The URI of what is there and is not read, on purpose."""

    path: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Source number `index`, found to exist; `format` is never `auto`. `folder` is None for the standard library,
    which every machine finds for itself."""

    index: int
    config: SourceConfig
    format: Format
    folder: Store | None

    @property
    def uri(self) -> str:
        return self.config.uri

    @property
    def kind(self) -> Kind:
        return self.format if self.format == "chat" or self.format == "preference" else "text"

    def store(self) -> Store:
        return Store(sysconfig.get_paths()["stdlib"]) if self.folder is None else self.folder

    def name(self, path: str) -> str:
        """The URI of a file of this source, or of a folder; bytes of a name that are no text are escaped too."""
        if self.folder is None:
            return f"{STDLIB}/{path}"
        if not path:
            return self.folder.uri
        if self.folder.local_path() is None:
            return self.folder.child(path).uri
        return f"{self.folder.uri.rstrip('/')}/{quote(os.fsencode(path))}"


@dataclass(frozen=True)
class Corpus:
    """What the sources consist of; `pieces`, `left_out` and `unreadable` by source, the pieces in the order in which
    they are to be read. `fingerprint` is a hash of the files' paths, sizes and times."""

    sources: tuple[Source, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    left_out: tuple[tuple[LeftOut, ...], ...]
    unreadable: tuple[tuple[Quarantined, ...], ...]
    fingerprint: str

    @property
    def quarantined(self) -> tuple[Quarantined, ...]:
        """What could not even be listed, of all sources."""
        return tuple(item for items in self.unreadable for item in items)


def find_corpus(configs: Sequence[SourceConfig], field: str = "data.sources") -> Corpus:
    """List the sources' files. `field` is where in the recipe they stand.

    Raises DataError for a source that is missing, empty or of unclear format, StorageError for one that cannot be
    listed."""
    found = [_find(index, config, f"{field}[{index}]") for index, config in enumerate(configs)]
    listing: list[list[object]] = [[STDLIB, platform.python_version()]]
    for source, pieces, _, unreadable in found:
        files = [[piece.file.path, piece.size, piece.file.modified] for piece in pieces]
        listing.append([source.uri, files, [item.path for item in unreadable]])
    return Corpus(
        tuple(source for source, _, _, _ in found),
        tuple(pieces for _, pieces, _, _ in found),
        tuple(left_out for _, _, left_out, _ in found),
        tuple(unreadable for _, _, _, unreadable in found),
        xxhash.xxh3_128_hexdigest(json.dumps(listing).encode()),
    )


def group_pieces(pieces: Sequence[Piece], part_bytes: int) -> list[tuple[Piece, ...]]:
    """The pieces of a source in groups of at least `part_bytes` of storage (but the last one) and at most
    FILES_IN_GROUP files, a larger piece divided first. Depends on its arguments alone, never on the cluster."""
    groups: list[tuple[Piece, ...]] = []
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        step = max(1, part_bytes // piece.unit) * piece.unit if piece.unit else piece.size
        for begin in range(piece.begin, piece.end, step):
            group.append(Piece(piece.file, begin, min(begin + step, piece.end), piece.unit))
            size += group[-1].size
            if size >= part_bytes or len(group) >= FILES_IN_GROUP:
                groups.append(tuple(group))
                group, size = [], 0
    return [*groups, tuple(group)] if group else groups


_Found = tuple[Source, tuple[Piece, ...], tuple[LeftOut, ...], tuple[Quarantined, ...]]


def _find(index: int, config: SourceConfig, field: str) -> _Found:
    try:
        found = _list_stdlib() if config.uri == STDLIB else list_source(config.uri)
        if config.format != "code":  # of code every file that is none is left out
            for path in [path for path in found.files if why_packed(path)]:
                del found.files[path]
                found.unreadable.append((path, str(why_packed(path))))
        source = Source(index, config, _format(config, found), None if config.uri == STDLIB else found.store)
        _check_columns(source, field)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{field}.uri={config.uri!r}: {error}") from error
    if source.folder is not None:
        _leave_out(source, found)
    left_out = tuple(LeftOut(source.name(path), reason) for path, reason in sorted(found.left_out))
    unreadable = tuple(Quarantined(source.name(path), 0, reason) for path, reason in sorted(found.unreadable))
    if not found.files:
        why = [f"{item.path}: {item.reason}" for item in unreadable]
        why += [f"{item.path}: {item.reason}" for item in left_out]
        more = f" and {len(why) - 3} more" if len(why) > 3 else ""
        raise DataError(
            f"{field}.uri={config.uri!r} yields no text ({'; '.join(why[:3])}{more}); point it at files with text"
        )
    ordered = sorted(found.files, key=lambda path: (xxhash.xxh3_64_intdigest(os.fsencode(path)), path))
    files = [SourceFile(index, path, found.files[path].size, found.files[path].mtime_ns) for path in ordered]
    return source, tuple(Piece(file, 0, file.size, _unit(source, file)) for file in files), left_out, unreadable


def _format(config: SourceConfig, found: Listing) -> Format:
    """Raises ValueError if it has to be said."""
    if config.uri == STDLIB:
        if config.format not in ("auto", "code", "text"):
            raise ValueError(f"it is source code, and not of format {config.format}; leave format out")
        return "text" if config.format == "text" else "code"
    return common_format(found.files) if config.format == "auto" else config.format


def _check_columns(source: Source, field: str) -> None:
    """A column that nothing would be read from is refused."""
    if source.format in ("text", "code") and source.config.metadata_columns:
        raise DataError(
            f"{field}.metadata_columns={list(source.config.metadata_columns)}: format {source.format} has no columns; "
            "leave it out, or set format"
        )
    if source.format in ("text", "code", "preference") and source.config.text_column is not None:
        raise DataError(
            f"{field}.text_column={source.config.text_column!r}: format {source.format} has no such column; leave it "
            "out, or set format"
        )


def _unit(source: Source, file: SourceFile) -> int:
    container = container_of(file.path, source.format)
    if codec_of(file.path):
        return 0
    if container == "text":
        return DOCUMENT_BYTES if file.size > WHOLE_FILE_BYTES else 0
    return {"jsonl": DOCUMENT_BYTES, "parquet": PARQUET_BYTES}.get(container, 0)


def _leave_out(source: Source, found: Listing) -> None:
    """Move what is none of the source's data from the files to what is left out."""
    reasons: dict[str, str] = {}
    if source.format == "code" and len(found.files) > 1:
        reasons = {path: why for path in found.files if (why := why_no_code(path))}
    elif len(found.files) > 1:
        reasons = {
            path: f"no {source.format}: it only lies beside the data"
            for path in found.files
            if not is_read(path, source.format)
        }
    if source.format in ("arrow", "chat", "preference"):
        reasons |= _not_saved(source, found)
    for path, reason in reasons.items():
        del found.files[path]
        found.left_out.append((path, reason))


def _not_saved(source: Source, found: Listing) -> dict[str, str]:
    """Caches of results that the `datasets` library leaves beside the files of a saved data set.

    Its state.json names those files; one that is named and not there is unreadable."""
    reasons: dict[str, str] = {}
    for state in [path for path in found.files if path.rpartition("/")[2] == "state.json"]:
        folder = state.removesuffix("state.json")
        names = _data_files(source, found.files[state], state)
        if names:
            arrows = {path for path in found.files if path.rpartition("/")[0] == folder.rstrip("/")} - {state}
            saved = {folder + name for name in names}
            reasons |= {path: f"{state} does not name it" for path in arrows - saved if named_format(path) == "arrow"}
            listed = found.files.keys() | {path for path, _ in (*found.left_out, *found.unreadable)}
            found.unreadable.extend((path, f"{state} names it, and it is not there") for path in saved - listed)
    return reasons


def _data_files(source: Source, status: FileStat, state: str) -> list[str]:
    """Empty if the file is no state of a saved data set."""
    if status.size > _STATE_BYTES:
        return []
    try:
        names = [entry["filename"] for entry in source.store().read_json(state)["_data_files"]]
    except (ValueError, TypeError, KeyError):
        return []
    except StorageError as error:
        if isinstance(error, NotFound) or isinstance(error.__cause__, PermissionError):
            return []
        raise
    return [name for name in names if isinstance(name, str) and "/" not in name]


def _list_stdlib() -> Listing:
    root = sysconfig.get_paths()["stdlib"]
    found = Listing(Store(root))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]  # site-packages may be huge
        for path in (os.path.join(folder, name) for name in names if name.endswith(".py")):
            found.add(os.path.relpath(path, root), FileStat(os.path.getsize(path), 0))
    return found
