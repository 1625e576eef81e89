"""What is needed: policy against brute force, and places of a store in recipes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import Store
from pipelines.retention import Policy, RetentionError, RunFacts, artifact_at, find_roots, roots_of
from pipelines.runs import Run
from pipelines.service.index import write_submission
from pipelines.service.submission import Submission

DAY = 86400.0


@given(
    ended=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 20)),
    keep_last=st.none() | st.integers(0, 5),
    keep_days=st.none() | st.integers(0, 20),
)
def test_a_run_is_kept_if_few_ended_after_it_or_it_is_young(ended, keep_last, keep_days):
    kept = Policy(keep_last, keep_days).kept({run: at * DAY for run, at in ended.items()}, 20 * DAY)
    for run, at in ended.items():
        later = sum((other_at, other) > (at, run) for other, other_at in ended.items())
        among_last = keep_last is not None and later < keep_last
        young = keep_days is not None and 20 - at < keep_days
        assert (run in kept) == (among_last or young or (keep_last is None and keep_days is None))


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_policy_that_is_none_is_refused(value):
    with pytest.raises(RetentionError, match="--keep-days=.* is not a number from 0 up"):
        Policy(keep_days=value)


@pytest.mark.parametrize(
    ("uri", "place", "found"),
    [
        ("s3://b/p?region=x", "s3://b/p/artifacts/export/k", (("export", "k"), None)),
        ("s3://b/p", "s3://b/p/artifacts/export/k/attempts/a?region=x", (("export", "k"), None)),
        (
            "s3://b/p",
            "s3://b/p/artifacts/pretrain/k/checkpoints/step-00000010",
            (("pretrain", "k"), frozenset({"step-00000010"})),
        ),
        ("s3://b/p", "s3://b/p/artifacts/pretrain/k/checkpoints", (("pretrain", "k"), None)),
        ("s3://b/p", "s3://b/p/artifacts/export", None),
        ("s3://b/p", "s3://b/q/artifacts/export/k", None),
        ("s3://b/p", "gs://b/p/artifacts/export/k", None),
        ("s3://b/p", "s3://user:secret@b/p/artifacts/export/k", None),
        ("s3://b/p", "organisation/dataset", None),
        ("/data/store", "/data/store/artifacts/export/k", (("export", "k"), None)),
        ("/data/store", "file:///data/store/artifacts/export/k", (("export", "k"), None)),
        ("/data/store", "/data/store2/artifacts/export/k", None),
        ("/data/store", "quickstart", None),
        ("/data/store", "a/../..", None),
    ],
)
def test_places_of_a_store_are_known_by_their_artifact(uri, place, found):
    assert artifact_at(Store(uri), place) == found


def test_a_place_behind_a_link_is_known(tmp_path: Path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    place = str(tmp_path / "link" / "artifacts" / "export" / "k")
    assert artifact_at(Store(tmp_path / "store"), place) == (("export", "k"), None)


def test_needs_of_several_runs_add_up():
    store = Store("s3://b/p")
    step = "s3://b/p/artifacts/pretrain/k/checkpoints/step-00000001"
    runs = [
        RunFacts("a", 1.0, (("shards", "s"),), (step,)),
        RunFacts("b", None, (("shards", "s"),), (step.replace("1", "2"),)),
    ]
    roots = roots_of(store, runs, Policy(), 2.0)
    assert roots.needs["shards", "s"].active and roots.needs["shards", "s"].steps is None
    assert roots.needs["pretrain", "k"].steps == {"step-00000001", "step-00000002"}
    roots = roots_of(store, [*runs, RunFacts("c", 1.0, (("pretrain", "k"),))], Policy(), 2.0)
    assert roots.needs["pretrain", "k"].steps is None, "its own run may be exported from any checkpoint"


def test_a_run_that_waits_to_be_resumed_has_not_ended(tmp_path: Path):
    store = Store(tmp_path)
    run = Run.create(store, "name: x\n", "r")
    run.status.state, run.status.ended = "failed", 1.0
    run.save()
    for asked, kept in ((None, ()), (Submission(), ("r",)), (Submission(outcome="failed", ended=1.0), ())):
        if asked is not None:
            write_submission(store, "r", asked)
        assert find_roots(store, Policy(keep_last=0), now=1e12).kept == kept
