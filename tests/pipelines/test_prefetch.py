import gc
import multiprocessing
import subprocess
import sys
import threading
import time

import pytest

from pipelines.prefetch import Prefetch
from tests.pipelines.background import eventually, threads


def test_values_come_in_order_and_no_more_than_asked_for_are_made_ahead():
    made = []
    prefetch = Prefetch(lambda number: made.append(number) or number * number, 3, 2)
    eventually(lambda: made == [3, 4])
    time.sleep(0.05)
    assert made == [3, 4]
    assert [next(prefetch) for _ in range(50)] == [number * number for number in range(3, 53)]
    prefetch.close()
    assert len(made) <= 50 + 3


def test_an_error_comes_in_its_turn():
    def make(number):
        if number == 2:
            raise OSError("no disk")
        return number

    prefetch = Prefetch(make, 0, 8)
    assert [next(prefetch), next(prefetch)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="no disk"):
            next(prefetch)
    prefetch.close()


@pytest.mark.parametrize("end", [Prefetch.close, lambda prefetch: None])
def test_the_thread_ends_with_close_and_when_nobody_is_left_to_take(end):
    before = threads("prefetch")
    prefetch = Prefetch(lambda number: number, 0, 1)
    assert next(prefetch) == 0 and len(threads("prefetch") - before) == 1
    end(prefetch)
    del prefetch
    gc.collect()
    eventually(lambda: threads("prefetch") == before)


def test_closing_wakes_who_waits():
    gate, raised = threading.Event(), []
    prefetch = Prefetch(lambda number: gate.wait(10), 0, 1)

    def wait():
        with pytest.raises(RuntimeError, match="closed while") as error:
            next(prefetch)
        raised.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    closing = threading.Thread(target=prefetch.close)
    closing.start()
    eventually(lambda: raised)
    gate.set()
    closing.join()


def take_in_fork(prefetch, answers):
    try:
        answers.put(next(prefetch))
    except RuntimeError as error:
        answers.put(str(error))


def test_a_forked_process_is_told_that_nothing_is_made_there():
    context = multiprocessing.get_context("fork")
    prefetch, answers = Prefetch(lambda number: number, 0, 1), context.SimpleQueue()
    assert next(prefetch) == 0
    child = context.Process(target=take_in_fork, args=(prefetch, answers))
    child.start()
    assert "forked" in answers.get()
    child.join()
    prefetch.close()


def test_a_process_that_ends_without_close_waits_for_the_thread():
    script = """
import time
from pipelines.prefetch import Prefetch

def make(number):
    time.sleep(0.3)
    print("made", number, flush=True)

prefetch = Prefetch(make, 0, 2)
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "made 0\n" and not done.stderr
