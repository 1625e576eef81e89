import random

from llama.engine import queue as queue_module
from llama.engine.blocks import BlockTable
from llama.engine.params import SamplingParams
from llama.engine.queue import WaitingQueue
from llama.engine.request import Request

ARRIVALS = iter(range(1, 10**6))


def make(name: str, salt: str = "", priority: int = 0, admission: int | None = None) -> Request:
    request = Request(name, SamplingParams(), [1], BlockTable(b""), 100, salt=salt, priority=priority)
    request.arrival = next(ARRIVALS)
    request.admission = admission
    return request


def fill(queue: WaitingQueue, *requests: Request) -> None:
    for request in requests:
        queue.append(request)


def order(queue: WaitingQueue) -> str:
    return " ".join(request.request_id for request in queue)


def test_priority_then_the_preempted_then_arrival():
    queue = WaitingQueue()
    fill(queue, make("a"), make("low", priority=1), make("b"), make("high", priority=-1))
    for name, admission in (("second", 8), ("first", 3), ("third", 9)):
        queue.put_back(make(name, admission=admission))
    assert order(queue) == "high first second third a b low"
    assert len(queue) == 7
    for request in list(queue)[1:6]:
        queue.remove(request)
    assert order(queue) == "high low" and len(queue) == 2


def test_the_tenant_that_was_served_least_is_next():
    queue = WaitingQueue()
    fill(queue, make("a1", "a"), make("a2", "a"), make("b1", "b"), make("b2", "b"))
    assert order(queue) == "a1 a2 b1 b2"
    queue.charge("a", prompt_tokens=10)
    assert order(queue) == "b1 b2 a1 a2"
    queue.charge("b", generated_tokens=6)
    assert order(queue) == "a1 a2 b1 b2", "a generated token counts twice"


def test_idleness_saves_up_no_credit_and_debt_is_not_forgotten_by_leaving():
    queue = WaitingQueue()
    worker = make("w1", "worker")
    fill(queue, worker)
    queue.charge("worker", prompt_tokens=1000)
    queue.charge("debtor", prompt_tokens=1500)
    fill(queue, make("idler", "idler"), make("debtor", "debtor"), make("w2", "worker"))
    # The idler is lifted to the worker's 1,000: arrival decides between them.
    assert order(queue) == "w1 w2 idler debtor"
    queue.charge("idler", prompt_tokens=400)
    queue.charge("worker", prompt_tokens=450)
    assert order(queue) == "idler w1 w2 debtor"
    for request in list(queue):
        queue.remove(request)
    queue.forget_service()
    queue.charge("worker", prompt_tokens=1)
    fill(queue, make("idler", "idler"), make("w1", "worker"), make("debtor", "debtor"), make("w2", "worker"))
    assert order(queue) == "idler debtor w1 w2"


def test_an_empty_queue_lifts_to_who_left_it_last():
    """A worker whose requests are all admitted at once has nobody waiting, and yet an idler must not catch up."""
    queue = WaitingQueue()
    for name in ("w1", "w2"):
        worker = make(name, "worker")
        fill(queue, worker)
        queue.remove(worker)
        queue.charge("worker", prompt_tokens=1000)
    fill(queue, make("i1", "idler"), make("w3", "worker"))
    queue.charge("idler", prompt_tokens=1)
    assert order(queue) == "w3 i1"


def test_the_order_follows_every_change():
    """Against a sort of everything, as often as anything happens."""
    rng = random.Random(3)
    queue, waiting = WaitingQueue(), []
    for step in range(3000):
        salt = rng.choice("abcdef")
        if rng.random() < 0.4 and len(waiting) < 30:
            waiting.append(make(str(step), salt, priority=rng.randrange(2)))
            fill(queue, waiting[-1])
        elif rng.random() < 0.5 and waiting:
            queue.remove(waiting.pop(rng.randrange(len(waiting))))
        else:
            queue.charge(salt, prompt_tokens=rng.randrange(4))
        first = {
            (request.priority, request.salt): request.arrival for request in sorted(waiting, key=lambda r: -r.arrival)
        }
        assert list(queue) == sorted(
            waiting,
            key=lambda r: (r.priority, queue._served.get(r.salt, 0.0), first[r.priority, r.salt], r.arrival),
        )
        assert list(queue.before(1)) == [request for request in queue if request.priority < 1]


def test_backlogged_tenants_get_the_same_service_within_one_request():
    """The bound of VTC (arXiv:2401.00588, theorem 4.8), by brute force: costs differ by tenant, all always wait."""
    rng = random.Random(5)
    queue, served = WaitingQueue(), dict.fromkeys("abc", 0.0)
    largest = {"a": 4, "b": 90, "c": 1000}
    for salt in "abc":
        fill(queue, make(salt, salt), make(salt, salt))
    for _ in range(3000):
        request = next(iter(queue))
        queue.remove(request)
        fill(queue, make(request.salt, request.salt))
        tokens = rng.randrange(1, largest[request.salt])
        queue.charge(request.salt, prompt_tokens=tokens)
        served[request.salt] += tokens
    assert max(served.values()) - min(served.values()) <= 1000
    assert min(served.values()) > 5000


def test_forgotten_tenants_are_those_served_least(monkeypatch):
    monkeypatch.setattr(queue_module, "MAX_COUNTERS", 4)
    queue = WaitingQueue()
    fill(queue, make("x", "waits"))
    queue.charge("waits", prompt_tokens=1)
    for salt, tokens in (("heavy", 90), ("light", 5), ("middle", 40), ("least", 2)):
        queue.charge(salt, prompt_tokens=tokens)
    assert set(queue._served) == {"waits", "heavy"}


def test_tenants_beyond_the_limit_cost_no_more_than_others(monkeypatch):
    """Were one forgotten at a time, the next charge of a running one would again sort them all."""
    monkeypatch.setattr(queue_module, "MAX_COUNTERS", 100)
    forget, times = WaitingQueue._forget_half, []
    monkeypatch.setattr(WaitingQueue, "_forget_half", lambda self: (times.append(1), forget(self)))
    queue = WaitingQueue()
    for number in range(101):
        queue.charge(f"old-{number}", prompt_tokens=100)
    for _ in range(20):
        for number in range(40):
            queue.charge(f"new-{number}", generated_tokens=1)
    assert len(times) == 1
    fill(queue, *(make("x", f"waits-{number}") for number in range(1000)))
    for number in range(1000):
        queue.charge(f"waits-{number}", prompt_tokens=1)
    assert len(times) < 8
