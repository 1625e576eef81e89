"""The per-process routing state: bookings, other processes' load, predictions, waiting for events."""

import asyncio
import threading
from dataclasses import replace

from cluster.serve.messages import Admission, GenerateRequest, ReplicaInfo, ReplicaLoad, ReplicaUpdate
from cluster.serve.state import RESERVATION_TIMEOUT_S, SILENCE_S, RoutingState, routing_state
from llama.engine import BlocksStored, CacheSnapshot, SamplingParams, generation_root, hash_blocks

BLOCK = 16


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _load(running: int = 0, free: int = 100, prefill: int = 0, decode: int = 0) -> ReplicaLoad:
    return ReplicaLoad(running, 0, free, prefill, decode, 0, 0, 0, 0)


def _info(replica: str, weights_id: str = "w") -> ReplicaInfo:
    return ReplicaInfo(replica, 1, "node", weights_id, 1000, 512, BLOCK, 100)


def _snapshot(replica: str, hashes: tuple[bytes, ...] = (), weights_id: str = "w") -> ReplicaUpdate:
    return ReplicaUpdate("e", _load(), snapshot=CacheSnapshot("e", 0, hashes), info=_info(replica, weights_id))


def _select(state: RoutingState, request: GenerateRequest, candidates: list[str]) -> list[str]:
    state.begin(request.request_id)
    return state.select(request, candidates)


def _request(request_id: str, num_tokens: int = 64, first: int = 0, avoid: frozenset[str] = frozenset()):
    token_ids = tuple(range(first, first + num_tokens))
    hashes = tuple(hash_blocks(generation_root("w"), token_ids, BLOCK))
    return GenerateRequest(request_id, token_ids, hashes, SamplingParams(), "w", avoid)


def _state(*replicas: str, clock: _Clock | None = None) -> RoutingState:
    state = RoutingState(clock=clock or _Clock())
    state.set_replicas(replicas)
    for replica in replicas:
        assert state.apply_update(replica, _snapshot(replica))
    return state


def test_a_burst_sees_its_own_bookings():
    state = _state("a", "b")
    chosen = [_select(state, _request(f"r{n}", first=1000 * n), ["a", "b"])[0] for n in range(40)]
    assert chosen.count("a") == chosen.count("b") == 20


def test_a_cached_prefix_is_predicted_where_it_is():
    state = _state("a", "b")
    request = _request("r", num_tokens=64)
    assert state.apply_update("b", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes),)))
    assert _select(state, request, ["a", "b"]) == ["b", "a"]
    assert state.booked_on("r") == "b"
    assert state.placed(request, "b") == 48  # the fourth block holds the last token


def test_an_accepted_second_choice_takes_the_booking_and_its_own_prediction():
    state = _state("a", "b")
    request = _request("r")
    state.apply_update("b", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes),)))
    _select(state, request, ["a", "b"])
    assert state.placed(request, "a") == 0
    assert state.booked_on("r") == "a"
    assert [status.active_requests for status in state.status()] == [1, 0]


def test_a_finished_request_leaves_nothing():
    state = _state("a")
    request = _request("r")
    _select(state, request, ["a"])
    state.first_token("r", 64)
    state.progress("r", 3)
    state.finish("r")
    assert state.status()[0].active_requests == 0
    assert state.booked_on("r") is None
    assert state.placed(request, "a") == 0


def test_a_request_that_is_over_or_was_never_begun_here_is_ranked_but_not_booked():
    state = _state("a")
    assert _select(state, _request("over"), ["a"]) == ["a"]
    state.finish("over")
    assert state.select(_request("over"), ["a"]) == ["a"]  # Serve was still about to route it
    assert state.select(_request("stranger"), ["a"]) == ["a"]
    assert state.status()[0].active_requests == 0


def test_a_forgotten_request_ends_at_its_deadline():
    clock = _Clock()
    state = _state("a", clock=clock)
    _select(state, _request("lost"), ["a"])
    clock.now = RESERVATION_TIMEOUT_S - 1
    _select(state, _request("second"), ["a"])
    assert state.status()[0].active_requests == 2
    clock.now = RESERVATION_TIMEOUT_S + 1
    _select(state, _request("third"), ["a"])
    assert state.booked_on("lost") is None and state.booked_on("second") == "a"


def test_other_processes_work_counts_and_ones_own_is_not_counted_twice():
    state = _state("a", "b")
    for n in range(4):  # four of ours on a
        _select(state, _request(f"own{n}", first=1000 * n), ["a"])
    admitted = tuple(Admission(f"own{n}", 64, ()) for n in range(4))
    state.apply_update("a", ReplicaUpdate("e", _load(running=4, prefill=4 * 64), admitted=admitted))
    for n in range(4):  # so b takes the next four and is level with a, not behind it
        assert _select(state, _request(f"next{n}", first=10_000 + 1000 * n), ["a", "b"])[0] == "b"
    admitted = tuple(Admission(f"next{n}", 64, ()) for n in range(4))
    load = _load(running=9, prefill=4 * 64 + 5000)  # five of another ingress
    state.apply_update("b", ReplicaUpdate("e", load, admitted=admitted))
    assert _select(state, _request("last", first=90_000), ["a", "b"])[0] == "a"


def test_concurrent_requests_meet_where_their_prefix_is_being_computed():
    state = _state("a", "b")
    request = _request("first", num_tokens=80)
    first = _select(state, request, ["a", "b"])[0]
    other = "b" if first == "a" else "a"
    for n in range(8):
        twin = _request(f"twin{n}", num_tokens=80)
        assert _select(state, twin, ["a", "b"])[0] == first
        assert state.placed(twin, first) == 64
        state.finish(f"twin{n}")
    state.finish("first")  # aborted before it came anywhere
    _select(state, _request("later", num_tokens=80), ["a", "b"])
    assert state.placed(_request("later", num_tokens=80), first) == 0
    state.finish("later")

    admission = Admission("a stranger's", 80, request.hashes)
    state.apply_update(other, ReplicaUpdate("e", _load(running=1, prefill=80), admitted=(admission,)))
    assert _select(state, _request("twin", num_tokens=80), ["a", "b"])[0] == other
    state.finish("twin")
    state.apply_update(other, ReplicaUpdate("e", _load(), prefilled=("a stranger's",)))  # it was aborted
    _select(state, _request("last", num_tokens=80), ["a", "b"])
    assert state.placed(_request("last", num_tokens=80), other) == 0


def test_promises_of_a_broken_subscription_are_forgotten_but_for_what_is_on_its_way():
    state = _state("a")
    own, foreign = _request("own", num_tokens=80), _request("foreign", num_tokens=80, first=500)
    _select(state, own, ["a"])
    state.apply_update("a", ReplicaUpdate("e", _load(), admitted=(Admission("foreign", 80, foreign.hashes),)))
    state.lost_subscription("a")
    state.apply_update("a", _snapshot("a"))
    for n, (request, expected) in enumerate([(own, 64), (foreign, 0)]):
        twin = replace(request, request_id=f"twin{n}")
        _select(state, twin, ["a"])
        assert state.placed(twin, "a") == expected
        state.finish(twin.request_id)


def test_draining_replicas_come_last():
    state = _state("a", "b")
    request = _request("r")
    state.apply_update("b", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes),)))
    assert _select(state, request, ["a", "b"]) == ["b", "a"]
    state.apply_update("b", ReplicaUpdate("e", replace(_load(), draining=True)))
    assert _select(state, request, ["a", "b"]) == ["a", "b"]


def test_the_wait_is_learnt_from_first_tokens():
    clock = _Clock()
    state = _state("a", clock=clock)
    assert state.predicted_wait_s(_request("probe", num_tokens=64)) == 64 / 32_000
    for n in range(200):  # 0.5 s, and 10 ms a token
        request = _request(f"r{n}", num_tokens=32 + 16 * (n % 5), first=1000 * n)
        _select(state, request, ["a"])
        clock.now += 0.5 + 0.01 * len(request.token_ids)
        state.apply_update("a", ReplicaUpdate("e", _load()))
        state.first_token(request.request_id, len(request.token_ids))
        state.finish(request.request_id)
    assert abs(state.predicted_wait_s(_request("probe", num_tokens=64)) - 1.14) < 0.02
    assert state.predicted_wait_s(replace(_request("probe"), request_id="nobody")) > 1
    assert state.status()[0].active_requests == 0  # a question books nothing


def test_new_requests_are_for_the_weights_of_most_replicas_then_for_the_newest():
    state = _state("a", "b", "c")
    assert state.model("").weights_id == "w"
    assert state.model("another family") is None
    state.apply_update("a", _snapshot("a", weights_id="v"))
    assert state.model("").weights_id == "w"
    state.apply_update("b", _snapshot("b", weights_id="v"))
    assert state.model("").weights_id == "v"
    state.set_replicas(["b", "c"])
    assert state.model("").weights_id == "v"


def test_a_selection_is_kept_until_the_request_ends():
    clock = _Clock()
    clock.now = 2.0
    state = _state("a", "b", clock=clock)
    request = _request("r")
    assert state.selection("r") is None
    ranking = _select(state, request, ["a", "b"])
    selection = state.selection("r")
    assert selection.at == 2.0 and selection.seconds > 0
    assert [score.replica for score in selection.scores] == ranking
    assert selection.score("b").missing_tokens == 64 and selection.score("c") is None
    state.finish("r")
    assert state.selection("r") is None


def test_replicas_on_which_a_request_failed_come_last():
    state = _state("a", "b", "c")
    request = _request("r")
    state.apply_update("b", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes),)))
    assert _select(state, request, ["a", "b", "c"])[0] == "b"
    ranking = _select(state, _request("r", avoid=frozenset({"b"})), ["a", "b", "c"])
    assert ranking[-1] == "b" and state.booked_on("r") == ranking[0]
    assert _select(state, _request("r", avoid=frozenset({"b"})), ["b"]) == ["b"]


def test_a_gap_ends_predictions_until_the_next_snapshot():
    state = _state("a")
    request = _request("r")
    assert state.apply_update("a", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes),)))
    assert not state.apply_update("a", ReplicaUpdate("e", _load(), (BlocksStored(3, (b"x" * 16,)),)))
    assert not state.status()[0].fresh
    _select(state, request, ["a"])
    assert state.placed(request, "a") == 0
    assert state.apply_update("a", _snapshot("a", request.hashes))
    _select(state, request, ["a"])
    assert state.placed(request, "a") == 48
    assert state.apply_update("a", ReplicaUpdate("e", _load(), seq=0))
    assert not state.apply_update("a", ReplicaUpdate("e", _load(), seq=1))  # an event did not come, and no other after


def test_a_broken_subscription_ends_predictions():
    state = _state("a")
    state.lost_subscription("a")
    assert not state.status()[0].fresh


def test_departed_replicas_are_forgotten_and_their_late_updates_refused():
    state = _state("a", "b")
    changes = []
    state.on_replicas_changed(lambda: changes.append(state.replicas))
    state.set_replicas(["b", "c"])
    assert changes == [["a", "b"], ["b", "c"]]
    assert not state.apply_update("a", _snapshot("a"))
    assert [(status.replica, status.fresh) for status in state.status()] == [("b", True), ("c", False)]


def test_a_replica_not_heard_of_yet_can_be_chosen():
    state = RoutingState(clock=_Clock())
    state.set_replicas(["a"])
    assert state.info("w") is None
    assert _select(state, _request("r"), ["a"]) == ["a"]


def test_replicas_of_another_model_are_used_only_if_there_is_no_other():
    state = _state("old", "new")
    state.set_replicas(["old", "new", "starting"])
    state.apply_update("old", _snapshot("old", _request("r").hashes, weights_id="v"))
    assert sorted(_select(state, _request("r"), ["old", "new", "starting"])) == ["new", "starting"]
    assert _select(state, _request("r"), ["old"]) == ["old"]  # which refuses it
    assert state.info("w").replica == "new" and state.info("v").replica == "old"
    assert state.info("x") is None


def test_a_silent_replica_is_not_fresh_and_nothing_is_predicted_there():
    clock = _Clock()
    state = _state("a", "b", clock=clock)
    request = _request("r")
    state.apply_update("b", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes),)))
    clock.now = SILENCE_S
    assert [status.fresh for status in state.status()] == [True, True]
    assert _select(state, request, ["a", "b"])[0] == "b" and state.placed(request, "b") == 48
    clock.now = SILENCE_S + 0.1
    assert [status.fresh for status in state.status()] == [False, False]
    _select(state, request, ["b"])
    assert state.placed(request, "b") == 0
    state.apply_update("b", ReplicaUpdate("e", _load()))  # it was only slow, and nothing was lost
    assert [status.fresh for status in state.status()] == [False, True]
    _select(state, request, ["b"])
    assert state.placed(request, "b") == 48


def test_waiting_for_events_ends_when_they_are_applied_or_the_time_is_up():
    async def run() -> None:
        state = _state("a")
        assert await state.wait_applied("a", 0, 0.01)
        assert not await state.wait_applied("a", 1, 0.01)
        waiting = asyncio.create_task(state.wait_applied("a", 2, 5.0))
        await asyncio.sleep(0)
        update = ReplicaUpdate("e", _load(), (BlocksStored(1, (b"x" * 16,)), BlocksStored(2, (b"y" * 16,))))
        thread = threading.Thread(target=state.apply_update, args=("a", update))
        thread.start()
        assert await waiting
        thread.join()

    asyncio.run(run())


def test_each_application_has_one_state_a_process():
    assert routing_state("one") is routing_state("one")
    assert routing_state("one") is not routing_state("two")


def test_what_is_cached_does_not_help_a_prompt_that_is_scored():
    state = _state("a", "b")
    request = _request("r")
    state.apply_update("b", ReplicaUpdate("e", _load(prefill=8), (BlocksStored(1, request.hashes),)))
    scored = replace(request, params=SamplingParams(prompt_logprobs=0))
    assert _select(state, scored, ["a", "b"]) == ["a", "b"]
    assert state.placed(scored, "a") == 0
    assert _select(state, request, ["a", "b"]) == ["b", "a"]


def test_a_draining_replica_comes_last_also_when_it_falls_silent():
    clock = _Clock()
    state = _state("a", "b", clock=clock)
    state.apply_update("a", ReplicaUpdate("e", replace(_load(), draining=True)))
    clock.now = SILENCE_S + 1
    busy = ReplicaUpdate("e", _load(running=50, prefill=100_000, decode=100_000))
    state.apply_update("b", busy)
    assert _select(state, _request("r"), ["a", "b"]) == ["b", "a"]


def test_another_attempt_is_booked_nowhere_until_it_is_routed():
    state = _state("a")
    _select(state, _request("r"), ["a"])
    state.begin("r")
    assert state.booked_on("r") is None and state.selection("r") is None
    assert state.status()[0].active_requests == 0


def test_a_second_choice_that_reports_the_request_before_serve_does_is_not_counted_twice():
    state = _state("a", "b")
    request = _request("r")
    state.apply_update("a", ReplicaUpdate("e", _load(), (BlocksStored(1, request.hashes[:2]),)))
    _select(state, request, ["a", "b"])
    assert state.booked_on("r") == "a"
    admitted = (Admission("r", 64, request.hashes),)
    state.apply_update("b", ReplicaUpdate("e", _load(running=1, prefill=64), admitted=admitted))
    assert state.booked_on("r") == "b"
    state.placed(request, "b")
    _select(state, _request("next", first=1000), ["a", "b"])
    scores = {score.replica: score.candidate for score in state.selection("next").scores}
    assert (scores["b"].active_requests, scores["b"].pending_prefill_tokens) == (1, 64)
    assert (scores["a"].active_requests, scores["a"].pending_prefill_tokens) == (0, 0)
