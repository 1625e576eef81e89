"""Where text comes from: the files of a recipe's sources, cut into documents.

`stdlib` is Python's own standard library on the machine: every `.py` file except tests and installed packages, one
document each. Any other URI is a plain-text file or a folder of them (recursive; names that begin with a dot are left
out; links to folders are not followed).

A plain-text file of up to WHOLE_FILE_BYTES is one document. A larger one is cut into documents of about
DOCUMENT_BYTES: a cut lies after the first blank line in each stretch of DOCUMENT_BYTES, failing that after the first
newline, failing that between two characters. Whether a stretch is read alone or with its neighbours, the cuts are the
same, so a file of any size can be read in parallel and in bounded memory.

Within a source, files are taken in the order of a hash of their path: a capped corpus is then a sample of the whole
source rather than its first folders, and still the same on every machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

import xxhash

from cluster.storage import FileStat, Store

if TYPE_CHECKING:
    from pipelines.recipe import SourceConfig

STDLIB = "stdlib"
WHOLE_FILE_BYTES = 256 * 1024
DOCUMENT_BYTES = 16 * 1024

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


class DataError(ValueError):
    """The data is not there, or not what the recipe needs."""


@dataclass(frozen=True)
class SourceFile:
    """A file of source number `source`; `size` in bytes; `path` relative to the source's folder.

    `modified` is the time of its last change in ns; 0 where a Python version says it, or for a single remote object.
    """

    source: int
    path: str
    size: int
    modified: int = 0


@dataclass(frozen=True)
class Piece:
    """Bytes `begin` to `end` of a file: all of a file that is one document, else whole stretches of DOCUMENT_BYTES."""

    file: SourceFile
    begin: int
    end: int
    whole: bool

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Document:
    """`id` is the xxh3_128 of the text in hexadecimal; equal texts have equal ids. `offset` is the byte in the file."""

    id: str
    text: str
    path: str
    offset: int


@dataclass(frozen=True)
class Quarantined:
    """A document that could not be read, and why."""

    path: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Source:
    """A source found to exist. `folder` is None for the standard library, which every machine finds for itself."""

    folder: Store | None

    @property
    def uri(self) -> str:
        return STDLIB if self.folder is None else self.folder.uri

    def store(self) -> Store:
        return Store(sysconfig.get_paths()["stdlib"]) if self.folder is None else self.folder

    def name(self, path: str) -> str:
        """What to call a file of this source in messages and metadata."""
        return f"{STDLIB}/{path}" if self.folder is None else self.folder.child(path).uri


@dataclass(frozen=True)
class Corpus:
    """The pieces to read, in order, and a fingerprint of the files they come from."""

    sources: tuple[Source, ...]
    pieces: tuple[Piece, ...]
    fingerprint: str

    def parts(self, part_bytes: int) -> list[tuple[Piece, ...]]:
        """The pieces in groups of at least `part_bytes` (but the last one), a larger piece divided first.

        Depends on the corpus and `part_bytes` alone, never on the cluster."""
        stretch = max(1, part_bytes // DOCUMENT_BYTES) * DOCUMENT_BYTES
        groups: list[tuple[Piece, ...]] = []
        group: list[Piece] = []
        size = 0
        for piece in self.pieces:
            step = piece.size if piece.whole else stretch
            for begin in range(piece.begin, piece.end, step):
                group.append(Piece(piece.file, begin, min(begin + step, piece.end), piece.whole))
                size += group[-1].size
                if size >= part_bytes:
                    groups.append(tuple(group))
                    group, size = [], 0
        return [*groups, tuple(group)] if group else groups


def find_corpus(configs: Sequence[SourceConfig], max_bytes: int | None) -> Corpus:
    """List the sources' files and take what the cap allows.

    `max_bytes` is divided among the sources in proportion to their weights; from each the first documents that fit
    are taken. Raises DataError for a missing or empty source, StorageError for one that cannot be listed.
    """
    sources: list[Source] = []
    pieces: list[Piece] = []
    listing: list[list[object]] = [[STDLIB, platform.python_version()]]
    total_weight = sum(config.weight for config in configs)
    for index, config in enumerate(configs):
        source, files = _find_files(index, config.uri)
        budget = None if max_bytes is None else int(max_bytes * config.weight / total_weight)
        taken = list(_take(files, budget, split=source.folder is not None))
        if not taken:
            limit = "" if budget is None else f" within its {budget} bytes of data.max_bytes={max_bytes}"
            raise DataError(f"data.sources[{index}].uri={config.uri!r} yields no text{limit}; point it at text files")
        sources.append(source)
        pieces.extend(taken)
        listing.append([source.uri, *([piece.file.path, piece.size, piece.file.modified] for piece in taken)])
    return Corpus(tuple(sources), tuple(pieces), xxhash.xxh3_128_hexdigest(json.dumps(listing).encode()))


def _find_files(index: int, uri: str) -> tuple[Source, list[SourceFile]]:
    """Raises DataError if there is nothing at `uri`."""
    try:
        source, files = _stdlib() if uri == STDLIB else _single_file(uri) or _folder(uri)
    except ValueError as error:
        raise DataError(f"data.sources[{index}].uri={uri!r}: {error}") from error
    if not files:
        local = source.store().local_path()
        if local is not None and not local.exists():
            raise DataError(f"data.sources[{index}].uri={uri!r} does not exist; give a text file, a folder or 'stdlib'")
        raise DataError(f"data.sources[{index}].uri={uri!r} has no files; give a text file, a folder or 'stdlib'")
    ordered = sorted(files, key=lambda path: (xxhash.xxh3_64_intdigest(os.fsencode(path)), path))
    return source, [SourceFile(index, path, files[path].size, files[path].mtime_ns) for path in ordered]


def _stdlib() -> tuple[Source, dict[str, FileStat]]:
    root = sysconfig.get_paths()["stdlib"]
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]  # site-packages may be huge
        for path in (os.path.join(folder, name) for name in names if name.endswith(".py")):
            files[os.path.relpath(path, root)] = FileStat(os.path.getsize(path), 0)
    return Source(None), files


def _folder(uri: str) -> tuple[Source, dict[str, FileStat]]:
    source = Source(Store(uri))
    files = source.store().stats()
    return source, {
        path: stat for path, stat in files.items() if not any(part.startswith(".") for part in path.split("/"))
    }


def _single_file(uri: str) -> tuple[Source, dict[str, FileStat]] | None:
    """`uri` as one file of its folder, or None if it is no file."""
    location, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    folder, slash, name = location.rstrip("/").rpartition("/")
    if "://" in uri:
        name = unquote(name)
    if not name or folder.endswith(":/"):  # the top of a bucket
        return None
    store = Store(f"{folder}/{mark}{options}" if slash else ".")
    if not store.exists(name):
        return None
    local = store.local_path(name)
    with store.open_input(name) as file:
        return Source(store), {name: FileStat(file.seek(0, 2), local.stat().st_mtime_ns if local else 0)}


def _take(files: Sequence[SourceFile], budget: int | None, split: bool) -> Iterator[Piece]:
    """The first documents that fit the budget of bytes; it stops at the first that does not."""
    left = sum(file.size for file in files) if budget is None else budget
    for file in files:
        whole = not split or file.size <= WHOLE_FILE_BYTES
        if file.size <= left:
            if file.size:
                yield Piece(file, 0, file.size, whole)
            left -= file.size
            continue
        stretches = left // DOCUMENT_BYTES
        if not whole and stretches:
            yield Piece(file, 0, stretches * DOCUMENT_BYTES, False)
        return


def read_documents(source: Source, piece: Piece) -> Iterator[Document | Quarantined]:
    """The piece's documents in order, newlines normalised to `\\n` and a byte-order mark removed.

    What is not UTF-8 text comes as Quarantined. Raises DataError if the file is not the one that was listed, which
    happens where machines see different files under one path, and StorageError if it cannot be read.
    """
    store = source.store()
    file = piece.file
    name = source.name(file.path)
    with store.open_input(file.path) as stream:
        size = stream.seek(0, 2)
        if size != file.size:
            raise DataError(
                f"{name} has {size} bytes on {platform.node()}, {file.size} where it was listed; put the source on "
                "storage that every machine sees, and run the same Python everywhere"
            )
        stream.seek(piece.begin)
        # To know where its last document ends, a piece must see the stretch after it.
        data = stream.read(piece.size if piece.whole else piece.size + DOCUMENT_BYTES)
    cuts = [0, len(data)] if piece.whole else _cuts(data, piece)
    for begin, end in zip(cuts, cuts[1:], strict=False):
        if begin < end:
            yield _document(data[begin:end], name, piece.begin + begin)


def _cuts(data: bytes, piece: Piece) -> list[int]:
    """Where the documents of the piece begin, and where the last one ends, as offsets in `data`."""
    cuts = []
    for stretch in range(0, piece.size + DOCUMENT_BYTES, DOCUMENT_BYTES):
        position = piece.begin + stretch
        if position == 0:
            cuts.append(0)
        elif position >= piece.file.size:
            cuts.append(piece.file.size - piece.begin)
            break
        else:
            cuts.append(stretch + first_cut(data[stretch : stretch + DOCUMENT_BYTES]))
    return cuts


def first_cut(stretch: bytes) -> int:
    """The best place in a stretch of UTF-8 text to begin a new document."""
    if blank := _BLANK_LINE.search(stretch):
        return blank.end()
    if (newline := stretch.find(b"\n")) >= 0:
        return newline + 1
    continuation = next((index for index, byte in enumerate(stretch[:4]) if byte & 0xC0 != 0x80), 0)
    return continuation


def _document(data: bytes, path: str, offset: int) -> Document | Quarantined:
    try:
        text = data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        return Quarantined(path, offset + error.start, f"not UTF-8: {error.reason}")
    if (nul := data.find(b"\0")) >= 0:
        return Quarantined(path, offset + nul, "binary: it has a NUL byte")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Document(xxhash.xxh3_128_hexdigest(text.encode()), text, path, offset)
