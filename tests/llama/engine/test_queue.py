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
    queue.forget_service()
    queue.charge("worker", prompt_tokens=1)
    assert order(queue) == "idler debtor w1 w2"


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
    monkeypatch.setattr(queue_module, "MAX_COUNTERS", 3)
    queue = WaitingQueue()
    fill(queue, make("x", "waits"))
    queue.charge("waits", prompt_tokens=1)
    for salt, tokens in (("heavy", 90), ("light", 5), ("middle", 40)):
        queue.charge(salt, prompt_tokens=tokens)
    assert set(queue._served) == {"waits", "heavy", "middle"}
