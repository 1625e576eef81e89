from pipelines.service.resources import capacity_of, taken_by


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
