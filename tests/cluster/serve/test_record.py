"""One request's record against a life made up by hand."""

import json
from dataclasses import replace

import pytest

from cluster.serve.cost import Candidate, CostCoefficients, choose
from cluster.serve.messages import GenerateRequest
from cluster.serve.record import KEPT_SCORES, Recording, Records, RequestRecord
from cluster.serve.state import Selection
from llama.engine import Chunk, SamplingParams
from llama.engine.request import RequestTiming

REQUEST = GenerateRequest("r", tuple(range(40)), (), SamplingParams(), "w", caller="alice", arrived=100.0)


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _recording(clock: _Clock, request: GenerateRequest = REQUEST) -> Recording:
    return Recording(request, model="m", ingress="i", clock=clock, now=5000.0 + clock.now)


def _selection(at: float, count: int = 2) -> Selection:
    candidates = [Candidate(f"r{n}", 0, 16 * n, 0, 0, 100) for n in range(count)]
    return Selection(at, 0.0001, tuple(choose((), 40, 16, candidates, CostCoefficients())))


def _chunk(completion_tokens: int, reason=None, index: int = 0, timing: RequestTiming | None = None) -> Chunk:
    return Chunk("r", [1], "x", reason, 16, 40, completion_tokens, None, 0, index, timing=timing)


class _Lost(Exception):
    code = "replica_lost"


def _lose(recording: Recording, replica: str | None, selection: Selection | None, during=lambda: None) -> None:
    with pytest.raises(_Lost), recording.attempt(lambda: (replica, selection)):
        during()
        raise _Lost


def _answered() -> RequestRecord:
    clock = _Clock()
    clock.now = 100.25  # tokenised in the meantime
    recording = _recording(clock)
    _lose(recording, "r0", _selection(100.375))
    with recording.attempt(lambda: ("r1", _selection(100.5))):
        for at, count in ((101.0, 1), (101.1, 2), (101.9, 3), (102.0, 4), (102.0, 5)):
            clock.now = at
            timing = RequestTiming(0.125, 7, 1) if count == 5 else None
            recording.chunk("r1", 32, _chunk(count, "length" if count == 5 else None, timing=timing))
        clock.now = 102.5
    return recording.finished()


def test_times_count_from_the_arrival_and_tokens_from_the_attempt_that_answered():
    record = _answered()
    assert (record.request_id, record.caller, record.model, record.ingress) == ("r", "alice", "m", "i")
    assert record.arrived_at == 5100.0
    assert (record.status, record.outcome, record.replica) == (200, "length", "r1")
    assert record.first_token_s == pytest.approx(1.0) and record.end_s == pytest.approx(2.5)
    assert record.inter_token_s == pytest.approx(0.25) and record.longest_gap_s == pytest.approx(0.8)
    assert (record.prompt_tokens, record.predicted_cached_tokens, record.cached_tokens) == (40, 32, 16)
    assert (record.generated_tokens, record.queue_s, record.steps, record.preemptions) == (5, 0.125, 7, 1)
    lost, answered = record.attempts
    assert (lost.replica, lost.outcome, answered.outcome) == ("r0", "replica_lost", "answered")
    assert lost.at_s == pytest.approx(0.375) and answered.at_s == pytest.approx(0.5)
    assert [score.replica for score in answered.scores] == ["r0", "r1"]


def test_what_a_lost_attempt_produced_does_not_count():
    clock = _Clock()
    recording = _recording(clock)
    _lose(recording, "r0", None, lambda: recording.chunk("r0", 32, _chunk(9)))
    clock.now = 101.0
    with recording.attempt(lambda: ("r1", None)):
        recording.chunk("r1", 0, _chunk(1, "stop"))
    record = recording.finished()
    assert (record.replica, record.generated_tokens, record.predicted_cached_tokens) == ("r1", 1, 0)
    assert record.first_token_s == 1.0 and record.inter_token_s is None and record.longest_gap_s is None
    assert [attempt.pick_s for attempt in record.attempts] == [None, None]


def test_completions_of_one_prompt_are_one_record():
    clock = _Clock()
    recording = _recording(clock, replace(REQUEST, params=SamplingParams(n=2)))
    with recording.attempt(lambda: ("r0", None)):
        for tick, count in enumerate((1, 2, 3)):
            for index in range(2):
                clock.now = 100.0 + tick + index / 4
                last = count == 3
                timing = RequestTiming(0.5 + index, 3, 1) if last else None
                recording.chunk("r0", 0, _chunk(count, "stop" if last else None, index, timing))
                assert recording.is_whole == (last and index == 1)
    record = recording.finished()
    assert (record.generated_tokens, record.queue_s, record.steps, record.preemptions) == (6, 0.5, 3, 2)
    assert record.longest_gap_s == 1.0 and record.inter_token_s == pytest.approx(2.25 / 2)


def test_a_request_that_was_never_answered_says_so():
    recording = _recording(_Clock(), replace(REQUEST, arrived=None, caller=""))
    _lose(recording, None, _selection(100.0))
    record = recording.finished(429, "rate_limit_exceeded")
    assert (record.status, record.outcome, record.replica) == (429, "rate_limit_exceeded", None)
    assert record.first_token_s is None and record.queue_s is None and record.generated_tokens == 0
    assert "caller=- status=429 outcome=rate_limit_exceeded replica=-" in record.log_line()


@pytest.mark.parametrize(("reason", "outcome"), [(None, "cancelled"), ("stop", "answered")])
def test_who_leaves_after_the_answer_has_not_cancelled_it(reason, outcome):
    recording = _recording(_Clock())
    with pytest.raises(GeneratorExit), recording.attempt(lambda: ("r0", None)):
        recording.chunk("r0", 0, _chunk(1, reason))
        raise GeneratorExit
    assert recording.finished().attempts[0].outcome == outcome


def test_at_many_replicas_the_best_scores_are_kept():
    recording = _recording(_Clock())
    with recording.attempt(lambda: ("r0", _selection(100.0, 1000))):
        pass
    kept = recording.finished().attempts[0].scores
    assert [score.replica for score in kept] == [f"r{n}" for n in range(KEPT_SCORES)]


def test_a_record_is_json_and_the_terms_add_up_to_the_cost():
    coefficients = CostCoefficients(decode_weight=0.5, shortage_weight=3.0)
    candidates = [Candidate("full", 1, 160, 2000, 4, 1, slowness=2.0), Candidate("empty", 0, 0, 0, 0, 100)]
    selection = Selection(100.0, 0.0, tuple(choose((b"x", b"y"), 40, 16, candidates, coefficients)))
    recording = _recording(_Clock())
    with recording.attempt(lambda: ("empty", selection)):
        pass
    found = json.loads(json.dumps(recording.finished().as_json(coefficients)))
    empty, full = found["attempts"][0]["scores"]
    assert (empty["replica"], empty["shortage_s"], empty["predicted_cached_tokens"]) == ("empty", 0.0, 0)
    # 2 missing blocks, 1 free: 16 tokens of shortage, on a machine that is half as fast.
    second = coefficients.prefill_s_per_token * 2.0
    assert full["pending_s"] == pytest.approx(160 * second)
    assert full["missing_s"] == pytest.approx(24 * 5.0 * second)
    assert full["decode_s"] == pytest.approx(1000 * second)
    assert full["shortage_s"] == pytest.approx(16 * 3.0 * second)
    assert found["outcome"] == "unfinished" and found["queue_s"] is None


def test_a_log_line_is_one_line_of_fields_whatever_the_names_are():
    line = replace(_answered(), caller="eve\nrequest id=x status=200").log_line()
    assert "\n" not in line
    assert line.startswith('request id=r caller="eve\\nrequest id=x status=200" status=200 outcome=length replica=r1 ')
    assert line.endswith(" queue_ms=125.0 first_ms=1000.0 total_ms=2500.0")


def test_the_last_records_are_kept_newest_first():
    records = Records(limit=3)
    for name in "abcd":
        records.add(replace(_answered(), request_id=name))
    records.add(replace(_answered(), request_id="c", outcome="again"))
    assert [record.request_id for record in records.newest(10)] == ["d", "c", "b"]
    assert [record.request_id for record in records.newest(1)] == ["d"] and records.newest(0) == []
    assert records.find("a") == [] and [record.outcome for record in records.find("c")] == ["again"]


def test_the_prompts_of_one_request_are_found_by_its_name():
    records = Records()
    for name in ("mine-5f-0", "mine-5f-1", "mine", "mines-1", "other-1"):
        records.add(replace(_answered(), request_id=name))
    assert [record.request_id for record in records.find("mine-5f")] == ["mine-5f-1", "mine-5f-0"]
    assert [record.request_id for record in records.find("mine-5f-0")] == ["mine-5f-0"]
    assert [record.request_id for record in records.find("mine")] == ["mine"]
