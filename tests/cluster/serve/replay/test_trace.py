import json
from collections import Counter

import pytest

from cluster.serve.replay.trace import (
    Prompts,
    SyntheticTrace,
    TraceError,
    TraceRequest,
    make_trace,
    read_trace,
    scaled,
    spread,
    with_sessions,
)

GOOD = {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [4, 5]}


def _write(tmp_path, *lines):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_line_of_mooncakes_trace_is_a_request(tmp_path):
    path = _write(tmp_path, GOOD, "", {**GOOD, "timestamp": 4500.5})
    assert read_trace(path) == [TraceRequest(3.0, 600, 7, (4, 5), 0), TraceRequest(4.5005, 600, 7, (4, 5), 0)]
    assert len(read_trace(path, 1)) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a line of JSON"),
        ("[1]", "not an object"),
        ({**GOOD, "timestamp": -1}, "timestamp=-1"),
        ({**GOOD, "timestamp": True}, "timestamp=True"),
        ({**GOOD, "input_length": 0}, "input_length=0"),
        ({**GOOD, "output_length": "7"}, "output_length='7'"),
        ({**GOOD, "hash_ids": [1, -2]}, "hash_ids"),
        ({**GOOD, "hash_ids": [1]}, "1 hash_ids do not cover input_length=600"),
        ({**GOOD, "timestamp": 2}, "timestamp goes back"),
        ('{"timestamp": NaN, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "timestamp=nan"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, line, said):
    path = _write(tmp_path, GOOD, line)
    with pytest.raises(TraceError) as raised:
        read_trace(path)
    assert f"{path}:2: " in str(raised.value) and said in str(raised.value)


def test_an_empty_or_absent_trace_is_refused(tmp_path):
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(_write(tmp_path, ""))
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")


def test_prompts_share_what_their_ids_share():
    prompts = Prompts()
    one, two = (TraceRequest(0, 1500, 1, ids) for ids in [(7, 8, 9), (7, 8, 10)])
    first, second = prompts.tokens(one), prompts.tokens(two)
    assert len(first) == len(second) == 1500
    assert first[:1024] == second[:1024] and first[1024:] != second[1024:]
    assert prompts.text(one)[:1024] == prompts.text(two)[:1024] and len(prompts.text(one)) == 1500
    short = Prompts(16)
    assert len(short.tokens(one)) == short.length(one) == 1500 * 16 // 512
    assert short.tokens(one)[:32] == short.tokens(two)[:32]


def test_a_conversation_goes_on_from_its_longest_chain_of_two_blocks():
    chains = [(0, 1), (0, 2), (0, 1, 3), (0, 2, 4), (0,), (0, 1, 3, 5), (6, 1)]
    requests = with_sessions(TraceRequest(0, 512 * len(ids), 1, ids) for ids in chains)
    assert [request.session for request in requests] == [0, 1, 0, 1, 4, 0, 6]


def test_spreading_moves_stamps_inside_their_grid():
    requests = [TraceRequest(3.0 * (number // 10), 1, 1, (number,)) for number in range(1000)]
    moved = spread(requests, seed=1)
    assert [request.at for request in moved] == sorted(request.at for request in moved)
    for request in moved:
        assert 0 <= request.at - 3.0 * (request.hash_ids[0] // 10) < 3
    thirds = Counter(int(request.at % 3) for request in moved)
    assert min(thirds.values()) > 250
    assert spread(requests, seed=1) == moved != spread(requests, seed=2)


def test_scaling_starts_at_zero():
    assert [request.at for request in scaled([TraceRequest(at, 1, 1, (1,)) for at in (4, 6, 10)], 0.5)] == [0, 1, 3]


def test_a_made_up_trace_is_of_growing_conversations():
    settings = SyntheticTrace(requests=400, rate=10.0, seed=3)
    trace = make_trace(settings)
    assert trace == make_trace(settings) != make_trace(SyntheticTrace(requests=400, rate=10.0, seed=4))
    assert trace[-1].at == pytest.approx(40, rel=0.2)
    sessions = Counter(request.session for request in trace)
    assert max(sessions.values()) > 3 and len(sessions) > 40
    last: dict[int, TraceRequest] = {}
    for request in trace:
        assert len(request.hash_ids) == -(-request.input_tokens // 512)
        before = last.get(request.session)
        if before:
            assert request.hash_ids[: len(before.hash_ids) - 1] == before.hash_ids[:-1]
        last[request.session] = request
    bursts = make_trace(SyntheticTrace(requests=400, rate=10.0, burst=8, seed=3))
    assert len({request.at for request in bursts}) == 50
