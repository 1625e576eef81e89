"""The recipe's `data` section: where text comes from, what of it stays, and how it is packed.

Every rule of `clean` is off until it is given; the thresholds of the papers are in docs/data.md.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.section import Positive, Ratio, Section, lasting_uri

STDLIB = "stdlib"

Format = Literal["auto", "text", "code", "jsonl", "csv", "parquet", "arrow", "chat", "preference"]
Packing = Literal["concatenate", "best_fit"]


class SourceConfig(Section):
    """A source of text: `stdlib`, or the path, URI or glob of files or of a folder."""

    uri: Annotated[str, Field(min_length=1)]
    format: Format = "auto"
    """`auto` goes by the files' suffixes, and refuses a source whose suffixes disagree."""
    text_column: Annotated[str, Field(min_length=1)] | None = None
    """Column or key of the text in jsonl, csv, parquet and arrow, None being `text`; of the conversation in chat, None
    being `messages`."""
    metadata_columns: tuple[str, ...] = ()
    """Columns or keys that are kept beside each text."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of `data.max_bytes` or `data.max_tokens`, relative to the other sources. What a source cannot fill goes to
    the others."""
    max_tokens: Positive | None = None
    """Training tokens to take from this source at most."""

    @field_validator("uri")
    @classmethod
    def _means_the_same_everywhere(cls, uri: str) -> str:
        return uri if uri == STDLIB else lasting_uri(uri)


class LanguageConfig(Section):
    """Keeps documents in the wanted languages; needs the extra `caravan[language]`."""

    allowed: Annotated[tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...], Field(min_length=1)]
    """ISO 639-1 codes, such as en."""
    min_probability: Ratio = 0.65


class CleanConfig(Section):
    """Rules for each document by itself, in the order in which they are applied; None or false is off.

    The first two change a document, the others drop it. Words are runs of characters between white space. The ratios
    are those of Rae et al. 2021 (Gopher), appendix A.1, tables A1 and A2.
    """

    control_characters: bool = False
    """Remove control characters other than tab; those that end a line or a page become line feeds."""
    unicode: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    """Normalisation form."""
    max_chars: Positive | None = None
    min_words: Positive | None = None
    max_words: Positive | None = None
    min_mean_word_chars: Annotated[float, Field(gt=0)] | None = None
    max_mean_word_chars: Annotated[float, Field(gt=0)] | None = None
    max_symbol_ratio: Annotated[float, Field(ge=0)] | None = None
    """`#` and ellipses (`…` or `...`), each relative to the words; the larger counts."""
    max_bullet_line_ratio: Ratio | None = None
    """Lines that begin with a bullet point."""
    max_ellipsis_line_ratio: Ratio | None = None
    """Lines that end with an ellipsis."""
    min_alphabetic_word_ratio: Ratio | None = None
    """Words with at least one letter."""
    min_stop_words: Annotated[int, Field(ge=1, le=8)] | None = None
    """Distinct ones of the, be, to, of, and, that, have, with."""
    max_duplicate_line_ratio: Ratio | None = None
    """Lines that were there before."""
    max_duplicate_line_char_ratio: Ratio | None = None
    """Their share of the characters."""
    max_duplicate_paragraph_ratio: Ratio | None = None
    max_duplicate_paragraph_char_ratio: Ratio | None = None
    max_top_ngram_char_ratios: tuple[Ratio, Ratio, Ratio] | None = None
    """Share of the characters in the most frequent word n-gram, for n of 2, 3 and 4."""
    max_duplicate_ngram_char_ratios: tuple[Ratio, Ratio, Ratio, Ratio, Ratio, Ratio] | None = None
    """Share of the characters in word n-grams that were there before, for n of 5 to 10."""
    language: LanguageConfig | None = None

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for low, high in (("min_words", "max_words"), ("min_mean_word_chars", "max_mean_word_chars")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"data.clean.{low}={least} is above data.clean.{high}={most}; no text would stay")
        return self


class NearDuplicateConfig(Section):
    """Documents that share most of their word n-grams with an earlier one (MinHash-LSH, verified)."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of the sets of n-grams from which on a document is a duplicate."""
    ngram: Positive = 5
    """Words in an n-gram; a Chinese, Japanese or Korean character is a word."""
    num_perm: Annotated[int, Field(ge=16, le=1024)] = 128
    """Hash functions of a signature; more find more of the pairs near the threshold and cost more time."""


class DedupConfig(Section):
    exact: bool = True
    """Of equal texts keep the first."""
    near: NearDuplicateConfig | None = None


class DecontaminateConfig(Section):
    """Drops documents that contain text of evaluation sets."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    ngram: Positive = 13
    """Words in an n-gram (Brown et al. 2020, appendix C). An evaluation text with fewer is one n-gram as a whole; with
    fewer than 8, and than this, it is ignored and counted: `too_short` in the metadata of `dedup`."""
    max_matches: Annotated[int, Field(ge=0)] = 0
    """Distinct n-grams that a document may share with the evaluation sets. An evaluation text with no more than that,
    one of up to `ngram` words for 1, is then never found."""

    @model_validator(mode="after")
    def _read_whole(self) -> Self:
        for index, source in enumerate(self.sources):
            if source.weight != 1.0 or source.max_tokens is not None:
                raise ValueError(
                    f"data.decontaminate.sources[{index}] has a weight or max_tokens; evaluation sets are read whole, "
                    "leave both out"
                )
        return self


class DataConfig(Section):
    sources: tuple[SourceConfig, ...]
    max_bytes: Positive | None = None
    """Bytes of text to take at most, over all sources, before duplicates are dropped; None takes everything."""
    max_tokens: Positive | None = None
    """Training tokens to take at most, over all sources; None takes everything."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Fraction of the documents, chosen by their hash, that is held out."""
    min_document_chars: Positive = 32
    """Shorter documents are dropped, and counted."""
    max_document_bytes: Annotated[int, Field(ge=1 << 10)] = 16 << 20
    """A longer record is quarantined; a worker's memory is bounded by it. Plain text is cut into documents instead."""
    max_decompressed_bytes: Positive = 64 << 30
    """Of text of one compressed file, or of what is read at a time of a table (all of it, or 64 MiB of Parquet); what
    lies beyond is quarantined. Text that is no larger than its file is never cut."""
    part_bytes: Annotated[int, Field(ge=1 << 16)] = 16 << 20
    """Bytes of text in one file of documents or one shard: the unit of parallel work and of a worker's memory."""
    strict: bool = False
    """What cannot be read is an error, and not quarantined."""
    clean: CleanConfig = CleanConfig()
    dedup: DedupConfig = DedupConfig()
    decontaminate: DecontaminateConfig | None = None
    packing: Packing = "concatenate"
    """`concatenate` fills every row of a shard with the stream of its documents. `best_fit` keeps documents apart:
    attention and positions begin anew at each, and only a document longer than a row is cut."""

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one source, such as {uri: stdlib}")
        for index, source in enumerate(self.sources):
            where = f"data.sources[{index}]"
            if source.weight != 1.0 and self.max_bytes is None and self.max_tokens is None:
                raise ValueError(
                    f"{where}.weight={source.weight} is its share of data.max_bytes or data.max_tokens, and both are "
                    "absent; set one, or leave the weight out"
                )
            if source.format == "preference" and source.max_tokens is not None:
                raise ValueError(f"{where}.max_tokens={source.max_tokens}: preferences are not packed; leave it out")
            if source.format == "preference" and source.weight != 1.0 and self.max_bytes is None:
                raise ValueError(
                    f"{where}.weight={source.weight}: preferences are not packed and have no share of data.max_tokens; "
                    "leave it out, or set data.max_bytes"
                )
        return self
