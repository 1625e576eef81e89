import time

from llama.bench.harness import interleave
from pipelines.bench.turns import Turns


def test_turns_are_announced_and_timed() -> None:
    said: list[str] = []
    calls: list[int] = []

    def work() -> None:
        calls.append(len(said))
        time.sleep(0.002)

    turns = Turns("ours", work, 2, said.append)
    interleave({"ours": turns}, 2)
    assert said == ["ours: first turn, not a round", "ours: round 1 of 2", "ours: round 2 of 2"]
    assert calls == [1, 2, 3]
    assert len(turns.seconds) == 3 and min(turns.seconds) >= 0.002


def test_a_single_turn_is_not_called_a_first_one() -> None:
    said: list[str] = []
    interleave({"ours": Turns("ours", lambda: None, 0, said.append)}, 0)
    assert said == ["ours: its turn"]
