"""Run a function over independent pieces of work on the cluster, with Ray Data.

Ray Data gives what a pool of remote calls does not: bounded work in flight, retries, and a place in the dashboard.
Its pipelines cost seconds to start, so a stage uses one, and the pieces of work are small descriptions (what to read,
where to write), never the data.

Tasks, not actors: worker processes are shared with the stage before, and there is no actor pool that could hold every
CPU while its input waits for one.
"""

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Task(Generic[Item, Result]):
    """Carries items and results through Ray Data as bytes, so that Arrow has no types to guess."""

    def __init__(self, function: Callable[[Item], Result]) -> None:
        self._function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one task, one CPU: the cluster is the parallelism
        try:
            outcome: tuple[bool, object] = True, self._function(pickle.loads(row["item"]))
        except Exception as error:  # travels as a value: raised inside, Ray Data would wrap it and log it at length
            error.add_note("on a worker:\n" + traceback.format_exc())
            outcome = False, error
        return {"index": row["index"], "outcome": pickle.dumps(outcome)}


def map_on_cluster(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    on_result: Callable[[int], None] = lambda finished: None,
) -> list[Result]:
    """`[function(item) for item in items]`, in parallel, one CPU each. `on_result` hears how many have finished.

    Function, items and results are pickled. A task whose worker dies is run again, perhaps while the first is still at
    it, so the function must be idempotent. An exception of the function is raised here, with its remote traceback as
    a note; the other tasks are then cancelled.
    """
    if not items:
        return []
    import ray.data  # a second or more, which the many importers that only read data need not spend

    # Our stages report their own progress; without the last line Ray warns that its bars are off.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)

    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_Task(function), num_cpus=1)
    results: dict[int, Result] = {}
    for row in dataset.iter_rows():
        succeeded, outcome = pickle.loads(row["outcome"])
        if not succeeded:
            raise outcome
        results[row["index"]] = outcome
        on_result(len(results))
    return [results[index] for index in range(len(items))]
