"""Continuous batching with a paged, prefix-sharing key/value cache. Needs neither Ray nor a GPU."""

from llama.engine.blocks import (
    BlockEvent,
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    CacheCorrupted,
    CacheSnapshot,
    generation_root,
    hash_blocks,
    reusable_blocks,
)
from llama.engine.config import EngineConfig, EngineStats
from llama.engine.engine import Engine, EngineClosed
from llama.engine.output import EngineFailed
from llama.engine.request import Chunk, Completion, FinishReason, PromptTooLong, SamplingParams, TokenLogprob
from llama.engine.scheduler import QueueFull

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
    "SamplingParams",
    "TokenLogprob",
    "generation_root",
    "hash_blocks",
    "reusable_blocks",
]
