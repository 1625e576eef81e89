from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.util.state

from pipelines.service.resources import RayResources, capacity_of, taken_by


def test_gpus_count_by_kind_and_in_all() -> None:
    nodes = [
        {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H200": 1.0, "memory": 1e9, "node:127.0.0.1": 1.0},
        {"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 1.0},
        {"CPU": 2.0, "object_store_memory": 1e9},
    ]
    assert capacity_of(nodes) == {"CPU": 18.0, "GPU": 6.0, "GPU:H200": 4.0, "GPU:L4": 2.0}
    assert capacity_of([]) == {"CPU": 0.0, "GPU": 0.0}


def test_what_actors_hold_is_added_up() -> None:
    actors = [
        {"CPU": 0.5},
        {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H200": 0.001},
        {"memory": 5.0, "CPU_group_0_abc": 3.0},
        {},
    ]
    assert taken_by(actors) == {"CPU": 1.5, "GPU": 1.0, "GPU:H200": 1.0}


def test_its_own_cluster_is_asked_whatever_else_runs_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def listed(*found: Any) -> Any:
        def answer(address: str | None = None, **options: Any) -> list[Any]:
            asked.append(str(address))
            return list(found)

        return answer

    actors = [
        SimpleNamespace(job_id="ours", required_resources={"CPU": 1.0}),
        SimpleNamespace(job_id="theirs", required_resources={"CPU": 0.5}),
    ]
    group = SimpleNamespace(creator_job_id="theirs", bundles=[{"unit_resources": {"CPU": 1.0}}])
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    monkeypatch.setattr(ray.util.state, "list_actors", listed(*actors))
    monkeypatch.setattr(ray.util.state, "list_placement_groups", listed(group))
    room = RayResources("http://127.0.0.1:8265", {"GPU": 8.0}).look(["ours"])
    assert asked == ["http://127.0.0.1:8265"] * 2
    assert (room.capacity, room.others) == ({"CPU": 4.0, "GPU": 8.0}, {"CPU": 1.5})
