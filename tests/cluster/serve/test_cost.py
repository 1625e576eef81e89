"""The cost function and its ties."""

import random
from collections import Counter
from fractions import Fraction

import pytest

from cluster.serve.calibration import Speed
from cluster.serve.cost import Candidate, CostCoefficients, choose, rendezvous_weight
from llama.engine import generation_root, hash_blocks

BLOCK = 16
COEFFICIENTS = CostCoefficients()


def _hashes(num_tokens: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return hash_blocks(generation_root("w"), [rng.randrange(1000) for _ in range(num_tokens)], BLOCK)


def _idle(replica: str, matched: int = 0) -> Candidate:
    return Candidate(replica, matched, 0, 0, 0, 1000)


def test_the_cost_is_the_formula_of_the_module():
    rng = random.Random(1)
    coefficients = CostCoefficients(1 / 1024, 5.0, 1 / 4, 3.0)  # exact in binary, so == is meant
    for _ in range(200):
        num_tokens = rng.randrange(1, 400)
        candidate = Candidate(
            "a", rng.randrange(30), rng.randrange(999), rng.randrange(9999), rng.randrange(9), rng.randrange(30)
        )
        candidate = candidate._replace(slowness=rng.choice([1.0, 2.0]), speed=Speed(0.5, 0.25))
        (score,) = choose(_hashes(num_tokens), num_tokens, BLOCK, [candidate], coefficients)
        cached = min(candidate.matched_blocks, (num_tokens - 1) // BLOCK) * BLOCK
        need = Fraction(-(-num_tokens // BLOCK) - cached // BLOCK)
        expected = Fraction(int(candidate.slowness), 1024) * (
            candidate.pending_prefill_tokens
            + 5 * (num_tokens - cached)
            + Fraction(1, 4) * candidate.decode_context_tokens
            + 3 * BLOCK * max(0, need - candidate.free_blocks)
        )
        assert score.cost_s == float(expected)
        assert score.predicted_cached_tokens == cached
        assert score.missing_tokens == num_tokens - cached
        assert score.missing_blocks == need
        assert score.wait_s == 0.5 + (candidate.pending_prefill_tokens + num_tokens - cached) / 4


def test_the_last_token_of_a_prompt_is_never_cached():
    (score,) = choose(_hashes(48), 48, BLOCK, [_idle("a", matched=3)], COEFFICIENTS)
    assert score.predicted_cached_tokens == 32
    (score,) = choose(_hashes(49), 49, BLOCK, [_idle("a", matched=3)], COEFFICIENTS)
    assert score.predicted_cached_tokens == 48


def test_the_cache_wins_until_its_replica_is_too_busy():
    hashes = _hashes(320)

    def best(pending: int) -> str:
        busy = Candidate("cached", 10, pending, 0, 1, 1000)
        return choose(hashes, 320, BLOCK, [busy, _idle("empty")], COEFFICIENTS)[0].replica

    saved = int(COEFFICIENTS.missing_weight * 160)  # pending tokens that outweigh 160 cached ones
    assert best(0) == best(saved - 1) == "cached"
    assert best(saved + 1) == "empty"


def test_a_full_cache_costs():
    hashes = _hashes(160)
    full = Candidate("full", 0, 0, 0, 0, 2)
    assert choose(hashes, 160, BLOCK, [full, _idle("roomy")], COEFFICIENTS)[0].replica == "roomy"


def test_equal_costs_go_to_the_fewest_active_requests():
    idle_cost = CostCoefficients(decode_weight=0)
    busy = Candidate("busy", 0, 0, 500, 3, 1000)
    for seed in range(20):
        assert choose(_hashes(64, seed), 64, BLOCK, [busy, _idle("idle")], idle_cost)[0].replica == "idle"


def test_equal_replicas_share_prefixes_evenly_and_a_prefix_always_meets_itself():
    replicas = [f"replica-{n}" for n in range(4)]
    chosen = {}
    for seed in range(400):
        hashes = _hashes(64, seed)
        ranking = [score.replica for score in choose(hashes, 64, BLOCK, map(_idle, replicas), COEFFICIENTS)]
        again = [score.replica for score in choose(hashes, 64, BLOCK, map(_idle, reversed(replicas)), COEFFICIENTS)]
        assert ranking == again  # the order of the candidates does not matter
        chosen[seed] = ranking
    counts = Counter(ranking[0] for ranking in chosen.values())
    assert min(counts.values()) > 70  # 100 expected, standard deviation 8.7


@pytest.mark.parametrize("gone", range(4))
def test_a_departed_replica_moves_only_its_own_prefixes(gone):
    replicas = [f"replica-{n}" for n in range(4)]
    left = [replica for n, replica in enumerate(replicas) if n != gone]
    for seed in range(200):
        hashes = _hashes(64, seed)
        before = choose(hashes, 64, BLOCK, map(_idle, replicas), COEFFICIENTS)
        after = choose(hashes, 64, BLOCK, map(_idle, left), COEFFICIENTS)
        kept = [score.replica for score in before if score.replica in left]
        assert [score.replica for score in after] == kept


def test_ties_hash_the_first_missing_block():
    hashes = _hashes(64)
    replicas = ["a", "b", "c"]
    for matched in range(3):
        ranking = choose(hashes, 64, BLOCK, [_idle(replica, matched) for replica in replicas], COEFFICIENTS)
        expected = max(replicas, key=lambda replica: rendezvous_weight(hashes[matched], replica))
        assert ranking[0].replica == expected


def test_who_drains_or_has_failed_comes_last():
    hashes = _hashes(64)
    draining = _idle("draining", matched=3)._replace(draining=True)
    busy = Candidate("busy", 0, 10_000, 0, 9, 1000)
    ranking = choose(hashes, 64, BLOCK, [draining, _idle("failed"), busy], COEFFICIENTS, frozenset({"failed"}))
    assert [score.replica for score in ranking] == ["busy", "draining", "failed"]


def test_a_slow_replica_gets_less():
    hashes = _hashes(64)
    slow, fast = _idle("slow")._replace(slowness=2.0), Candidate("fast", 0, 900, 0, 1, 1000)
    assert choose(hashes, 64, BLOCK, [slow, fast], COEFFICIENTS)[0].replica == "slow"
    assert choose(hashes, 64, BLOCK, [slow._replace(slowness=4.0), fast], COEFFICIENTS)[0].replica == "fast"


def test_a_prompt_shorter_than_a_block_is_routed():
    ranking = choose([], 5, BLOCK, [_idle("a"), _idle("b")], COEFFICIENTS)
    assert {score.replica for score in ranking} == {"a", "b"}
    assert ranking[0].missing_blocks == 1
    assert choose([], 5, BLOCK, [], COEFFICIENTS) == []


@pytest.mark.parametrize("field", ["prefill_s_per_token", "missing_weight", "decode_weight", "shortage_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_coefficients_are_checked(field, value):
    with pytest.raises(ValueError, match=f"cost.{field}="):
        CostCoefficients(**{field: value})
