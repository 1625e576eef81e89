"""Making a stage anew though nothing has changed: `--force`.

    {store}/generations/{key}.json    how often the stage whose key would be `key` was made anew

A stage of a later generation has another key, and so have all that follow it. Nothing is deleted or replaced: who reads
the earlier artifact may go on with it, and every run of the recipe from now on takes the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.storage import NotFound, Store
from pipelines.graph import Graph

_FOLDER = "generations"


def read_generations(store: Store) -> dict[str, int]:
    """Of all stages that were made anew, by what their key was. Raises StorageError, and ValueError for damage."""
    return {name.removesuffix(".json"): _read(store, name) for name in store.child(_FOLDER).list()}


def make_anew(graph: Graph, names: Sequence[str], store: Store, run_id: str | None) -> Graph:
    """The graph in which these stages, and so what follows them, are of a generation that is not there yet.

    It is the store's from now on, by the word of the run `run_id`; with None this only looks ahead. Two runs at once
    may ask for the same generation, and share it.
    """
    for stage in list(graph.stages.values()):
        if stage.name not in names:
            continue
        key = graph.first_keys[stage.name]  # with the new keys of what it follows
        generation = graph.generations.get(key, 0) + 1
        if run_id is not None:
            store.child(_FOLDER).write_json(f"{key}.json", {"generation": generation, "run": run_id})
        graph = Graph(list(graph.stages.values()), {**graph.generations, key: generation})
    return graph


def _read(store: Store, name: str) -> int:
    try:
        record: Mapping[str, object] = store.child(_FOLDER).read_json(name)
        generation = record["generation"]
    except NotFound:
        return 0
    except (TypeError, KeyError):
        generation = None
    if not isinstance(generation, int) or generation < 0:
        raise ValueError(f"{store.uri}: {_FOLDER}/{name} is damaged; delete it")
    return generation
