"""What a run would do and why, in words."""

import pytest

from cluster.storage import Store
from pipelines.graph import Graph
from pipelines.plan import last_record, plan, write_record
from pipelines.runs import Run
from pipelines.stage import Stage

SETTINGS = {"vocab_size": 4096, "kind": "bpe", "special": ["<a>", "<b>"], "deep": {"rate": 0.5}}


def graph(settings=SETTINGS, version=1, **more):
    def nothing(context):
        return {}

    stages = [
        Stage("ingest", 1, {}, nothing),
        Stage("tokenizer", version, settings, nothing, ("ingest",)),
        Stage("shards", 1, {}, nothing, ("tokenizer", "ingest")),
        *(Stage(name, 1, {}, nothing, upstream) for name, upstream in more.items()),
        Stage("deploy", 1, {}, nothing, ("shards",), always=True),
    ]
    return Graph(stages)


@pytest.fixture
def before(tmp_path):
    store = Store(tmp_path)
    run = Run.create(store, "name: x\n", "r1")
    write_record(graph(), "x", run.directory)
    return last_record(store, "x")


def whys(now, before, committed=(), forced=()):
    return {
        step.stage: step.why for step in plan(now, now.selected(), committed, forced, before) if step.action == "run"
    }


def test_what_changed_is_said_with_its_values(before):
    assert whys(graph({**SETTINGS, "vocab_size": 8192}), before, ["ingest"]) == {
        "tokenizer": "vocab_size changed 4096 → 8192",
        "shards": "follows tokenizer",
        "deploy": "always runs",
    }
    deep = {**SETTINGS, "deep": {"rate": 0.25}, "special": ["<a>", "<c>"]}
    assert whys(graph(deep), before)["tokenizer"] == "special[1] changed <b> → <c>, deep.rate changed 0.5 → 0.25"
    fewer = {name: value for name, value in SETTINGS.items() if name != "kind"} | {"new": True}
    assert whys(graph(fewer), before)["tokenizer"] == "kind is no more, it was bpe, new is new: True"
    many = dict.fromkeys(SETTINGS, "x" * 99)
    why = whys(graph(many), before)["tokenizer"]
    assert why.endswith("and 1 more") and "x" * 39 + "…" in why
    assert whys(graph({**SETTINGS, "vocab_size": 4096.0}), before)["tokenizer"] == "vocab_size changed 4096 → 4096.0"


def test_other_reasons(before):
    assert whys(graph(version=2), before)["tokenizer"] == "its code changed, version 1 → 2"
    assert whys(graph(mine=("shards",)), before)["mine"] == "has not run before"
    assert whys(graph(), None)["ingest"] == "has not run before"
    assert whys(graph(), before)["ingest"] == "run r1 has not committed it, or it was deleted"
    assert whys(graph(), before, forced=["ingest"])["ingest"] == "made anew, as asked for"
    rewired = Graph([Stage("ingest", 1, {}, print), Stage("tokenizer", 1, SETTINGS, print)])
    assert whys(rewired, before)["tokenizer"] == "it follows nothing instead of ingest"


def test_what_is_committed_is_skipped(before):
    now = graph()
    steps = plan(now, now.selected(until="shards"), ["ingest", "tokenizer", "shards"], (), before)
    assert [(step.stage, step.action, step.why) for step in steps] == [
        (name, "skip", "committed already") for name in ("ingest", "tokenizer", "shards")
    ]
    assert [step.key for step in steps] == [now.keys[step.stage] for step in steps]


def test_the_last_run_of_the_same_recipe_counts(tmp_path):
    store = Store(tmp_path)
    assert last_record(store, "x") is None
    for run_id, name in (("r1", "x"), ("r2", "x"), ("r3", "other"), ("r4", None)):
        run = Run.create(store, "name: x\n", run_id)
        if name:
            write_record(graph(), name, run.directory)
    store.write_bytes("runs/r5/status.json", b"{}")
    store.write_bytes("runs/r5/graph.json", b"[]")
    assert last_record(store, "x").run_id == "r2"
    assert last_record(store, "nowhere") is None
