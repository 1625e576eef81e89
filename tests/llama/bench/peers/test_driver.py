import pytest

from llama.bench.peers import driver


class Scripted:
    """Gives every request a token a step, from a step of its own on; a step takes a second of its clock."""

    def __init__(self, starts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.steps, self.forgotten = 100.0, 0, 0
        self._starts, self._left, self._made = starts, {}, {}
        monkeypatch.setattr(driver.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(driver.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def add(self, name: str, prompt: list[int], generate: int) -> None:
        self._left[name], self._made[name] = generate, 0

    def step(self) -> list[tuple[str, list[int]]]:
        self.now, self.steps = self.now + 1, self.steps + 1
        outputs = []
        for name in [name for name in self._left if self.steps >= self._starts.get(name, 0)]:
            self._left[name] -= 1
            self._made[name] += 1
            outputs.append((name, [100 * int(name) + self._made[name]]))
            if not self._left[name]:
                del self._left[name]
        return outputs

    def forget(self) -> None:
        self.forgotten += 1


def test_prefill_lasts_until_the_last_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = driver.prefill(Scripted({"0": 3, "1": 1}, monkeypatch), [[5], [6]])
    assert answer == {"seconds": 3, "tokens": [1, 101]}


@pytest.mark.parametrize(("starts", "steps"), [({}, 11), ({"0": 1, "1": 4}, 8), ({"0": 6, "1": 1, "2": 2}, 6)])
def test_decode_counts_the_steps_in_which_all_decode(
    starts: dict[str, int], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(starts, monkeypatch)
    answer = driver.decode(engine, [[5]] * 3, generate=4)
    # 12 tokens each; the clock starts with the last one's first and stops with the first one's last.
    assert answer == {"seconds": steps, "generated": 3 * steps, "tokens": [1, 101, 201]}
    assert engine.step() == []  # all have finished


def test_decode_says_so_if_they_never_decode_together(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = driver.decode(Scripted({"1": 13}, monkeypatch), [[5]] * 2, generate=4)
    assert answer["seconds"] == 0 and answer["tokens"] == [1, 101]


def test_a_trace_is_replayed_by_the_clock_on_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted({}, monkeypatch)
    requests = [{"at": at, "prompt": [1], "generate": generate} for at, generate in ((0.5, 2), (0.7, 1), (9.0, 1))]
    answer = driver.trace(engine, requests)
    # The second came during the first one's step and waits for its end; for the third the engine sleeps.
    assert answer["times"] == [pytest.approx([1.5, 2.5]), pytest.approx([2.5]), pytest.approx([10.0])]
    assert engine.forgotten == 1


def test_the_fastest_way_is_that_of_the_second_calls() -> None:
    seconds = {"slow to start": iter([9.0, 1.0]), "steady": iter([2.0, 2.0])}
    assert (
        driver.fastest({name: lambda it=it: {"seconds": next(it)} for name, it in seconds.items()}) == "slow to start"
    )
