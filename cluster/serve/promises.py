"""Blocks that are on their way: what each replica will have cached once its admitted prompts are computed.

A prompt whose prefix is being computed somewhere is best sent there: the engine lets it wait for those blocks and
computes them once. So the blocks of a prefill count as the replica's from selection (or from the replica's own report)
until the prefill is over; by then they are in the index. Pure; not thread-safe.
"""

from collections import Counter
from collections.abc import Sequence


class Promises:
    """Blocks by replica, each as often as requests compute it; and which request promised what."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[bytes]] = {}
        self._requests: dict[str, tuple[str, tuple[bytes, ...]]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request_id: str, replica: str, hashes: Sequence[bytes]) -> None:
        """`replica` is to compute these blocks for a request; replaces what was promised for it before."""
        self.remove(request_id)
        if hashes:
            self._requests[request_id] = (replica, tuple(hashes))
            self._counts.setdefault(replica, Counter()).update(hashes)

    def remove(self, request_id: str) -> None:
        """The request's prefill is over, or will never be. Unknown ids are ignored."""
        replica, hashes = self._requests.pop(request_id, ("", ()))
        counts = self._counts.get(replica)
        if counts is None:
            return
        for block_hash in hashes:
            if counts[block_hash] == 1:
                del counts[block_hash]
            else:
                counts[block_hash] -= 1
        if not counts:
            del self._counts[replica]

    def requests_on(self, replica: str) -> list[str]:
        """The requests for which a replica computes blocks."""
        return [request_id for request_id, (holder, _) in self._requests.items() if holder == replica]

    def of(self, replica: str) -> Counter[bytes]:
        """The blocks that a replica is computing; to be read only."""
        return self._counts.get(replica, _NONE)


_NONE: Counter[bytes] = Counter()
