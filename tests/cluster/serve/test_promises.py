"""Promised blocks against a recount."""

import random
from collections import Counter

from cluster.serve.promises import Promises


def test_counts_equal_a_recount():
    rng = random.Random(0)
    promises, truth = Promises(), {}
    for _ in range(2000):
        request_id, replica = f"r{rng.randrange(20)}", rng.choice("ab")
        if rng.random() < 0.5:
            hashes = [bytes([rng.randrange(9)]) for _ in range(rng.randrange(4))]
            promises.add(request_id, replica, hashes)
            truth.pop(request_id, None)
            if hashes:
                truth[request_id] = (replica, hashes)
        else:
            promises.remove(request_id)
            truth.pop(request_id, None)
        assert len(promises) == len(truth)
        for name in "abc":
            mine = {key: hashes for key, (holder, hashes) in truth.items() if holder == name}
            assert promises.of(name) == Counter(block for hashes in mine.values() for block in hashes)
            assert sorted(promises.requests_on(name)) == sorted(mine)
