"""What a run needs of the cluster at the same time, before it may start.

The stages of a run come one after the other, so a run needs the most that any one of them needs, resource by resource:

    pretrain    the fewest workers that may train, at what one asks for: Ray Train starts all of them or none
    evaluate    what one training worker asks for: a Ray task
    deploy      all replicas of the endpoint, at what one asks for; ingress and proxy ask for none
    a user's    what its options ask for
    any other   one CPU: Ray Data runs on however many there are, one task at a time if need be

This is what a run can do with and not what it takes: Ray Data spreads over all CPUs that nobody else uses, a training
with `workers: [min, max]` takes up to max, and stages that run side by side queue for each other inside Ray. The
driver and the stages' own processes ask for nothing, and so count as nothing, though they do use some CPU and memory.
Whether one node has room for a whole worker is not looked at here; the driver refuses a run whose workers fit on none.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.placement import WorkerNeeds
from pipelines.recipe import Recipe
from pipelines.stage import Stage
from pipelines.stage_options import OWN_STAGES

LEAST = {"CPU": 1.0}


def needs_of(recipe: Recipe, stages: Iterable[Stage]) -> dict[str, float]:
    """Amounts by resource as pipelines/service/queue.py names them, of a run of these stages."""
    worker = recipe.train.worker_needs
    serve = recipe.serve
    replica = WorkerNeeds(serve.cpus_per_replica, serve.gpus_per_replica, serve.accelerator_type)
    fewest = recipe.train.world_sizes(recipe.model).fewest or recipe.train.world_sizes(recipe.model).smallest
    by_stage = {
        "pretrain": _amounts(worker, fewest),
        "evaluate": _amounts(worker, 1),
        "deploy": _amounts(replica, serve.replicas),
    }
    most: dict[str, float] = {}
    for stage in stages:
        taken = by_stage.get(stage.name, LEAST)
        if stage.name not in OWN_STAGES:
            own = stage.resources
            taken = _of(own.num_cpus, own.num_gpus, own.accelerator_type, 1)
        for name, amount in taken.items():
            most[name] = max(most.get(name, 0.0), amount)
    return most


def _amounts(each: WorkerNeeds, count: int) -> dict[str, float]:
    return _of(each.cpus, each.gpus, each.accelerator_type, count)


def _of(cpus: float, gpus: float, accelerator_type: str | None, count: int) -> dict[str, float]:
    amounts = {"CPU": cpus * count, "GPU": gpus * count}
    if accelerator_type is not None:
        amounts[f"GPU:{accelerator_type}"] = gpus * count
    return {name: round(amount, 6) for name, amount in amounts.items() if amount > 0}
