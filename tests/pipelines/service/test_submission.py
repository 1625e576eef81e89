"""The state of a run, for everything that its three sources can say together."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.jobs import Job
from pipelines.runs import INTERRUPTED, RunStatus
from pipelines.service.submission import OVER, STATES, Submission, outcome_error, state_of

NOW = 10_000.0
ASKED = Submission(submitted=100.0, tries=1, job_id="r", needs={"CPU": 1.0})
QUEUED = replace(ASKED, tries=0, job_id="")
PENDING = RunStatus(created=100.0)
RUNNING = RunStatus("running", created=100.0, started=200.0, heartbeat=NOW, job="r")
DONE = replace(RUNNING, state="done", ended=300.0)
FAILED = replace(RUNNING, state="failed", ended=300.0, error="the disk is full")
INTERRUPT = replace(FAILED, error=INTERRUPTED)


def job(status: str, message: str = "") -> Job:
    return Job("r", "r", status, message, "", 150.0, None, {})


def state(submission: Submission | None, status: RunStatus, of: Job | None = None, lost: bool = False) -> str:
    return state_of(submission, status, of, lost=lost, now=NOW)


def by_hand(status: RunStatus) -> RunStatus:
    return replace(status, job="")


STOP = replace(ASKED, stop_asked=250.0)


@pytest.mark.parametrize(
    ("submission", "status", "of", "lost", "expected"),
    [
        # a run of the command line, without the service
        (None, replace(PENDING, created=NOW), None, False, "starting"),
        (None, PENDING, None, False, "lost"),
        (None, by_hand(RUNNING), None, False, "running"),
        (None, by_hand(RUNNING), None, True, "lost"),
        (None, by_hand(DONE), None, False, "done"),
        (None, by_hand(FAILED), None, False, "failed"),
        (None, by_hand(INTERRUPT), None, False, "stopped"),
        # it waits
        (QUEUED, PENDING, None, False, "queued"),
        (replace(QUEUED, stop_asked=1.0), PENDING, None, False, "stopped"),
        (replace(QUEUED, tries=1), FAILED, None, False, "queued"),
        # its job has an id, and is not known: not submitted yet, or the cluster went with all its jobs
        (ASKED, PENDING, None, False, "starting"),
        (STOP, PENDING, None, False, "stopping"),
        (ASKED, RUNNING, None, False, "running"),
        (STOP, RUNNING, None, False, "stopping"),
        (ASKED, RUNNING, None, True, "lost"),
        (STOP, RUNNING, None, True, "stopped"),
        (ASKED, DONE, None, False, "done"),
        (ASKED, FAILED, None, False, "failed"),
        # the job is under way
        (ASKED, PENDING, job("PENDING"), False, "starting"),
        (ASKED, PENDING, job("RUNNING"), False, "starting"),
        (ASKED, replace(FAILED, job="r-0"), job("RUNNING"), False, "starting"),
        (ASKED, RUNNING, job("RUNNING"), False, "running"),
        (ASKED, RUNNING, job("RUNNING"), True, "running"),
        (STOP, PENDING, job("PENDING"), False, "stopping"),
        (STOP, RUNNING, job("RUNNING"), False, "stopping"),
        (ASKED, DONE, job("RUNNING"), False, "done"),
        (ASKED, FAILED, job("RUNNING"), False, "failed"),
        (STOP, INTERRUPT, job("RUNNING"), False, "stopped"),
        # the job is over
        (ASKED, DONE, job("SUCCEEDED"), False, "done"),
        (STOP, DONE, job("SUCCEEDED"), False, "done"),
        (ASKED, FAILED, job("FAILED"), False, "failed"),
        (ASKED, INTERRUPT, job("STOPPED"), False, "stopped"),
        (STOP, INTERRUPT, job("STOPPED"), False, "stopped"),
        (STOP, RUNNING, job("STOPPED"), False, "stopped"),
        (ASKED, RUNNING, job("STOPPED"), False, "stopped"),
        (ASKED, RUNNING, job("FAILED"), False, "lost"),
        (ASKED, PENDING, job("FAILED"), False, "failed"),
        (ASKED, replace(DONE, job="r-0"), job("FAILED"), False, "failed"),
        (STOP, PENDING, job("STOPPED"), False, "stopped"),
        # how it ended is known, whatever the cluster has forgotten
        (replace(ASKED, outcome="lost", ended=400.0), RUNNING, None, True, "lost"),
        (replace(ASKED, outcome="failed", ended=400.0), PENDING, None, False, "failed"),
        # somebody resumed it by hand after that, or while it waited
        (replace(ASKED, outcome="failed", ended=150.0), by_hand(RUNNING), None, False, "running"),
        (replace(ASKED, outcome="failed", ended=150.0), by_hand(RUNNING), None, True, "lost"),
        (replace(ASKED, outcome="stopped", ended=150.0), by_hand(DONE), job("STOPPED"), False, "done"),
        (replace(ASKED, outcome="stopped", ended=250.0), by_hand(DONE), job("STOPPED"), False, "stopped"),
        (QUEUED, by_hand(RUNNING), None, False, "running"),
    ],
)
def test_the_state_of_a_run(
    submission: Submission | None, status: RunStatus, of: Job | None, lost: bool, expected: str
) -> None:
    assert state(submission, status, of, lost) == expected


SUBMISSIONS = [None, QUEUED, ASKED, STOP, replace(QUEUED, stop_asked=1.0)] + [
    replace(ASKED, outcome=outcome, ended=400.0, stop_asked=asked)
    for outcome, asked in itertools.product(("stopped", "done", "failed", "lost"), (None, 250.0))
]
STATUSES = [
    replace(status, job=of)
    for status, of in itertools.product((PENDING, RUNNING, DONE, FAILED, INTERRUPT), ("", "r", "r-0"))
]
JOBS = [None, *map(job, ("PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"))]


def test_every_combination_has_one_state_and_a_known_outcome_stays() -> None:
    seen = set()
    for submission, status, of, lost in itertools.product(SUBMISSIONS, STATUSES, JOBS, (False, True)):
        found = state(submission, status, of, lost and status.state == "running")
        assert found in STATES
        seen.add(found)
        if submission is not None and submission.outcome and status.job:
            assert found == submission.outcome
        if submission is not None and of is not None and of.is_over and submission.job_id and status.job:
            assert found in OVER, "nothing is under way once the job is over"
        if submission is not None and submission.stop_asked is not None:
            assert found not in ("queued", "starting") and (found != "running" or not status.job)
        if submission is None:
            assert found not in ("queued", "stopping")
    assert seen == set(STATES)


TEXT = st.text(st.characters(categories=("L", "N", "P"), exclude_characters="="), min_size=1, max_size=64)


@given(
    st.builds(
        Submission,
        until=st.none() | TEXT,
        from_stage=st.none() | TEXT,
        force=st.lists(TEXT).map(tuple),
        keep=st.booleans(),
        priority=st.integers(-100, 100),
        tags=st.dictionaries(TEXT, TEXT, max_size=20),
        needs=st.dictionaries(TEXT, st.floats(0, 1e6)),
        submitted=st.floats(0, 1e10),
        stop_asked=st.none() | st.floats(0, 1e10),
        outcome=st.sampled_from(["", "done", "lost"]),
    )
)
def test_it_is_read_back_as_it_was_written(submission: Submission) -> None:
    assert Submission.from_json(json.loads(json.dumps(submission.to_json()))) == submission


@pytest.mark.parametrize("value", [None, [], {"priority": 101}, {"tags": {"a": ""}}, {"tags": {"a": "b=c"}}, {"x": 1}])
def test_what_is_no_submission_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Submission.from_json(value)


def test_every_try_has_a_job_of_its_own() -> None:
    submission, ids = Submission(), []
    for _ in range(3):
        submission.begin_try("run")
        ids.append(submission.job_id)
        submission.queue_again(5.0)
        assert (submission.job_id, submission.submitted) == ("", 5.0)
    assert ids == ["run", "run-2", "run-3"]


@pytest.mark.parametrize(
    ("status", "of", "found", "words"),
    [
        (FAILED, job("FAILED", "exit 1"), "failed", "the disk is full"),
        (RUNNING, job("FAILED", "killed by 9\n"), "lost", "ended without a word: killed by 9; resume it"),
        (RUNNING, None, "lost", "ended without a word; resume it"),
        (
            PENDING,
            job(
                "FAILED",
                "it failed with exit code 127, last available logs (truncated):\n\x1b[31mx\x1b[0m\nno python\n",
            ),
            "failed",
            "did not begin: it failed with exit code 127: no python",
        ),
        (PENDING, job("FAILED"), "failed", "did not begin"),
    ],
)
def test_why_it_ended_is_one_line(status: RunStatus, of: Job | None, found: str, words: str) -> None:
    error = outcome_error(ASKED, status, of, found)  # type: ignore[arg-type]
    assert error.endswith(words) and "\n" not in error
    assert outcome_error(ASKED, DONE, None, "done") == ""
