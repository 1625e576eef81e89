"""Continuous batching with a paged, prefix-sharing key/value cache. Needs neither Ray nor a GPU."""

from importlib import import_module
from typing import TYPE_CHECKING

from llama.engine.blocks import CacheCorrupted
from llama.engine.config import EngineConfig, EngineStats
from llama.engine.events import BlockEvent, BlocksRemoved, BlocksStored, CacheCleared, CacheSnapshot
from llama.engine.params import SamplingParams
from llama.engine.prefix import generation_root, hash_blocks, reusable_blocks
from llama.engine.prompt import PromptTooLong
from llama.engine.request import Chunk, Completion, FinishReason, RequestTiming, TokenLogprob
from llama.engine.scheduler import QueueFull

if TYPE_CHECKING:
    from llama.engine.engine import Engine
    from llama.engine.output import EngineClosed, EngineFailed

__all__ = [
    "BlockEvent",
    "BlocksRemoved",
    "BlocksStored",
    "CacheCleared",
    "CacheCorrupted",
    "CacheSnapshot",
    "Chunk",
    "Completion",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineFailed",
    "EngineStats",
    "FinishReason",
    "PromptTooLong",
    "QueueFull",
    "RequestTiming",
    "SamplingParams",
    "TokenLogprob",
    "generation_root",
    "hash_blocks",
    "reusable_blocks",
]

_NEED_TORCH = {"Engine": "engine", "EngineClosed": "output", "EngineFailed": "output"}


def __getattr__(name: str) -> object:
    # A router needs the hashes and event types, not the engine, and torch takes seconds to import.
    if name in _NEED_TORCH:
        return getattr(import_module(f"llama.engine.{_NEED_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
