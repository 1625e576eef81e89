from pathlib import Path

import pipelines
from pipelines.recipe import Recipe
from pipelines.service.needs import needs_of
from pipelines.stages import build_graph

QUICKSTART = Path(pipelines.__file__).parent / "recipes" / "quickstart.yaml"


def needs(until: str | None = None, *overrides: str) -> dict[str, float]:
    recipe = Recipe.load(QUICKSTART, overrides)
    return needs_of(recipe, build_graph(recipe, dashboard_url="", keep=False).selected(until))


def test_the_quickstart_fits_on_two_cpus_and_needs_both() -> None:
    assert needs() == {"CPU": 2.0}


def test_only_the_stages_that_run_count() -> None:
    assert needs("shards", "train.cpus_per_worker=8") == {"CPU": 1.0}
    assert needs("pretrain", "train.cpus_per_worker=8") == {"CPU": 16.0}
    assert needs("export", "serve.replicas=9", "serve.cpus_per_replica=2") == {"CPU": 2.0}
    assert needs(None, "serve.replicas=9", "serve.cpus_per_replica=2") == {"CPU": 18.0}


def test_gpus_of_a_kind_count_as_gpus_too() -> None:
    asked = ("train.gpus_per_worker=1", "train.accelerator_type=H200", "train.cpus_per_worker=3")
    assert needs("pretrain", *asked) == {"CPU": 6.0, "GPU": 2.0, "GPU:H200": 2.0}
    served = ("serve.gpus_per_replica=0.5", "serve.accelerator_type=L4", "serve.replicas=6")
    assert needs(None, *asked, *served) == {"CPU": 6.0, "GPU": 3.0, "GPU:H200": 2.0, "GPU:L4": 3.0}


def test_an_elastic_training_needs_the_fewest_workers_that_can_train() -> None:
    elastic = ("train.workers=[1, 8]", "train.parallel.dp_shard=-1")
    assert needs("pretrain", *elastic, "train.parallel.ep=1") == {"CPU": 1.0}
    assert needs("pretrain", *elastic, "train.parallel.ep=2") == {"CPU": 2.0}


def test_a_stage_of_the_user_s_own_needs_what_its_options_say() -> None:
    own = "stages={own: {uses: 'json:dumps', after: [ingest], num_cpus: 3, num_gpus: 1, accelerator_type: L4}}"
    assert needs("own", own) == {"CPU": 3.0, "GPU": 1.0, "GPU:L4": 1.0}
