"""The ledger against a recount from scratch."""

import random

import pytest

from cluster.serve.ledger import Ledger, LedgerLoad, Reservation


def _reservation(request_id: str, replica: str = "a", *, deadline: float = 100.0) -> Reservation:
    return Reservation(request_id, replica, num_tokens=40, missing_tokens=24, missing_blocks=2, deadline=deadline)


def test_a_request_counts_as_prefill_then_as_decode_then_not_at_all():
    ledger = Ledger()
    ledger.reserve(_reservation("r"))
    assert ledger.load("a") == LedgerLoad(1, 24, 2, 0)
    ledger.first_token("r")
    assert ledger.load("a") == LedgerLoad(1, 0, 0, 40)
    ledger.progress("r", 5)
    ledger.first_token("r")
    assert ledger.load("a") == LedgerLoad(1, 0, 0, 45)
    ledger.release("r")
    ledger.release("r")
    assert ledger.load("a") == LedgerLoad()
    assert len(ledger) == 0


def test_what_the_replica_has_acknowledged_is_not_on_its_way():
    ledger = Ledger()
    for name in ("r", "s", "t"):
        ledger.reserve(_reservation(name))
    assert ledger.on_its_way("a") == ledger.load("a") == LedgerLoad(3, 72, 6, 0)
    ledger.acknowledge("r")
    ledger.acknowledge("r")
    ledger.acknowledge("another's")
    ledger.first_token("s")  # which no replica produces of a request that it does not know
    assert [ledger.is_on_its_way(name) for name in ("r", "s", "t", "another's")] == [False, False, True, False]
    assert ledger.on_its_way("a") == LedgerLoad(1, 24, 2, 0)
    assert ledger.load("a") == LedgerLoad(3, 48, 4, 40)
    ledger.reserve(_reservation("r"))  # a second try
    assert ledger.on_its_way("a") == LedgerLoad(2, 48, 4, 0)
    for name in ("r", "s", "t"):
        ledger.release(name)
    assert ledger.on_its_way("a") == ledger.load("a") == LedgerLoad()


def test_a_second_booking_replaces_the_first():
    ledger = Ledger()
    ledger.reserve(_reservation("r", "a"))
    ledger.reserve(_reservation("r", "b"))
    assert ledger.replica_of("r") == "b"
    assert ledger.load("a") == LedgerLoad()
    assert ledger.load("b").active_requests == 1


def test_deadlines_release_what_nobody_released():
    ledger = Ledger()
    ledger.reserve(_reservation("early", deadline=10.0))
    ledger.reserve(_reservation("late", deadline=20.0))
    ledger.reserve(_reservation("moved", deadline=10.0))
    ledger.reserve(_reservation("moved", "b", deadline=30.0))
    assert ledger.expire(9.9) == []
    assert ledger.expire(10.0) == ["early"]
    assert ledger.load("a").active_requests == 1
    assert ledger.expire(25.0) == ["late"]
    assert ledger.replica_of("moved") == "b"


def test_a_departed_replica_takes_its_bookings_along():
    ledger = Ledger()
    for n in range(3):
        ledger.reserve(_reservation(f"a{n}", "a"))
        ledger.reserve(_reservation(f"b{n}", "b"))
    ledger.drop("a")
    assert ledger.load("a") == LedgerLoad()
    assert ledger.load("b").active_requests == 3
    assert ledger.replica_of("a0") is None


def test_unknown_requests_are_ignored():
    ledger = Ledger()
    ledger.first_token("nobody")
    ledger.progress("nobody", 3)
    ledger.release("nobody")
    assert ledger.replica_of("nobody") is None


@pytest.mark.parametrize("seed", range(5))
def test_totals_equal_a_recount(seed):
    rng = random.Random(seed)
    ledger = Ledger()
    truth: dict[str, tuple[Reservation, bool, int]] = {}
    for now in range(800):
        request_id, replica = f"r{rng.randrange(30)}", f"replica-{rng.randrange(3)}"
        action = rng.randrange(6)
        if action <= 1:
            reservation = Reservation(
                request_id, replica, rng.randrange(1, 99), rng.randrange(99), rng.randrange(9), now + rng.randrange(200)
            )
            ledger.reserve(reservation)
            truth[request_id] = (reservation, False, 0)
        elif action == 2:
            ledger.first_token(request_id)
            if request_id in truth:
                truth[request_id] = (truth[request_id][0], True, truth[request_id][2])
        elif action == 3:
            tokens = rng.randrange(50)
            ledger.progress(request_id, tokens)
            if request_id in truth and truth[request_id][1]:
                truth[request_id] = (truth[request_id][0], True, tokens)
        elif action == 4:
            ledger.release(request_id)
            truth.pop(request_id, None)
        else:
            expired = {key for key, (reservation, _, _) in truth.items() if reservation.deadline <= now}
            assert set(ledger.expire(now)) == expired
            truth = {key: entry for key, entry in truth.items() if key not in expired}
        for name in ("replica-0", "replica-1", "replica-2"):
            entries = [entry for entry in truth.values() if entry[0].replica == name]
            assert ledger.load(name) == LedgerLoad(
                len(entries),
                sum(reservation.missing_tokens for reservation, decoding, _ in entries if not decoding),
                sum(reservation.missing_blocks for reservation, decoding, _ in entries if not decoding),
                sum(reservation.num_tokens + tokens for reservation, decoding, tokens in entries if decoding),
            )


def test_what_has_ended_is_forgotten_long_before_its_deadline():
    ledger = Ledger()
    for number in range(3):
        ledger.reserve(_reservation(f"kept {number}", deadline=1000.0 + number))
    for number in range(20_000):
        ledger.reserve(_reservation(f"{number}", deadline=2000.0 + number))
        ledger.release(f"{number}")
    assert len(ledger._deadlines) < 2000
    assert ledger.expire(1001.0) == ["kept 0", "kept 1"]
    assert ledger.expire(1e9) == ["kept 2"] and len(ledger) == 0
