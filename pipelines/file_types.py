"""What a file's name says about what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal

from pipelines.data_config import Format

Codec = Literal["gzip", "zstd"]

_CODECS: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_ARCHIVES = frozenset({".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"})
_OTHER_CODECS = {".bz2": "bzip2", ".xz": "xz", ".lzma": "LZMA", ".lz4": "LZ4", ".br": "Brotli"}
_JSON = "json"
"""One JSON value, or lines of them: the suffix does not tell, so a recipe has to."""

_BESIDE_RECORDS = (
    "readme*",
    "license*",
    "licence*",
    "copying*",
    "notice*",
    "citation*",
    "dataset_info*.json",
    "dataset_dict.json",
    "state.json",
    "_success",
    "_metadata",
    "_common_metadata",
    "md5sums*",
    "sha*sums*",
)
_CODE_SUFFIXES = (
    ".asm .awk .bash .bat .bazel .bzl .c .cc .cl .clj .cljs .cmake .cpp .cs .css .cu .cuh .cxx .d .dart .el .erl .ex "
    ".exs .f .f90 .f95 .fs .fsx .glsl .go .gradle .groovy .h .hh .hpp .hs .htm .html .hxx .inc .java .jl .js .jsx .kt "
    ".kts .lean .less .lisp .lua .m .mjs .mk .ml .mli .mm .nim .nix .pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb "
    ".rkt .rs .s .scala .scm .scss .sh .sol .sql .sv .svelte .swift .tcl .tex .tf .thrift .ts .tsx .v .vb .vhd .vhdl "
    ".vue .wgsl .zig .zsh"
)
_CODE_NAMES = frozenset({"makefile", "gnumakefile", "dockerfile", "cmakelists.txt", "rakefile", "jenkinsfile"})
_NOT_OWN_CODE = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})


def codec_of(path: str) -> Codec | None:
    """How the name says that the file is compressed."""
    return _CODECS.get(_suffix(path))


def why_packed(path: str) -> str | None:
    """Why nothing is read of a file whose name says that other files, or its text, are packed in it."""
    suffix = _suffix(_uncompressed(path))
    if suffix in _ARCHIVES:
        return f"an archive ({suffix}); unpack it first"
    if codec := _OTHER_CODECS.get(suffix):
        return f"compressed with {codec}, and only gzip and zstd are read; decompress it first"
    return None


def container_of(path: str, format: Format) -> Format:
    """What the records of a file of this source lie in: conversations may come in any of them."""
    if format not in ("chat", "preference"):
        return format
    named = _FORMATS.get(_suffix(_uncompressed(path)), "jsonl")
    return named if named in ("parquet", "arrow") else "jsonl"


def delimiter_of(path: str) -> str:
    return "\t" if _suffix(_uncompressed(path)) == ".tsv" else ","


def is_beside_records(path: str) -> bool:
    """Whether a file is one of those that lie in a folder of records and hold none."""
    name = path.rpartition("/")[2].lower()
    return _suffix(_uncompressed(name)) not in _FORMATS and any(
        fnmatchcase(name, pattern) for pattern in _BESIDE_RECORDS
    )


def why_no_code(path: str) -> str | None:
    """Why a file of a source tree is not read, if it is not."""
    *folders, name = _uncompressed(path).split("/")
    for folder in folders:
        if folder in _NOT_OWN_CODE:
            return f"in {folder}, which holds no source code of its own"
    if _suffix(name) in _CODE_SUFFIXES.split() or name.lower() in _CODE_NAMES:
        return None
    return "no source code, by its name"


def common_format(paths: Iterable[str]) -> Format:
    """The format of files whose names agree: records of one kind, perhaps with a README beside them, or text.

    Raises ValueError with the formats and how many files have each."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for path in paths:
        if not is_beside_records(path):
            named = named_format(path)
            counts[named] += 1
            examples[named] = min(path, examples.get(named, path))
    if len(counts) > 1 or _JSON in counts:
        found = ", ".join(f"{name}: {count}, such as {examples[name]!r}" for name, count in sorted(counts.items()))
        if len(counts) > 1:
            raise ValueError(f"its files have different formats ({found}); set format, or name the files by a glob")
        raise ValueError(
            f"its suffixes do not tell the format ({found}); set format, such as jsonl if each line is an object, and "
            "write a file that is one JSON value as such lines first"
        )
    return next((name for name in _FORMATS.values() if name in counts), "text")


def is_read(path: str, format: Format) -> bool:
    """False for what lies beside the records of a folder. Beside texts only what is no text lies so."""
    return not is_beside_records(path) or (format == "text" and named_format(path) == "text")


def named_format(path: str) -> str:
    """The format that the suffix stands for; text if none, and `json` where it may stand for more than one."""
    suffix = _suffix(_uncompressed(path))
    return _JSON if suffix == ".json" else _FORMATS.get(suffix, "text")


def _uncompressed(path: str) -> str:
    return path.rpartition(".")[0] if codec_of(path) else path


def _suffix(path: str) -> str:
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if stem and dot else ""
