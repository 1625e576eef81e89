"""Names of blocks: a hash chain over the tokens of a sequence, so that equal prefixes have equal names.

The engine's cache and whoever predicts what is in it (a router) must agree on these, so they exist once, here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from xxhash import xxh3_128_digest


def generation_root(weights_id: str, adapter: str = "", salt: str = "") -> bytes:
    """The 16-byte root of every hash chain of one model generation: blocks of different roots never match.

    Args:
        weights_id: names the weights; it changes with every swap.
        adapter: names the adapter applied to them.
        salt: separates tenants.
    """
    # Length prefixes, or ("ab", "c") and ("a", "bc") would share a root.
    fields = (text.encode() for text in (weights_id, adapter, salt))
    return xxh3_128_digest(b"".join(struct.pack("<Q", len(data)) + data for data in fields))


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Four bytes a token, little-endian; each token in [0, 2³²)."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def hash_blocks(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of `token_ids`, each over its parent's hash and its own tokens.

    Args:
        root: `generation_root`, or the hash of the block before `token_ids` to continue a chain.
        token_ids: tokens, each in [0, 2³²).
        block_size: tokens a block.

    Returns:
        `len(token_ids) // block_size` hashes of 16 bytes; the unfinished block at the end has none.
    """
    packed = pack_tokens(token_ids[: len(token_ids) // block_size * block_size])
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(packed), 4 * block_size):
        parent = xxh3_128_digest(parent + packed[start : start + 4 * block_size])
        hashes.append(parent)
    return hashes


def reusable_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks of a prompt of `num_tokens` may come from the cache.

    The last token is always computed, because its logits are needed.
    """
    return max(0, num_tokens - 1) // block_size
