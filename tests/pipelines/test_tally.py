import json

from hypothesis import given
from hypothesis import strategies as st

from pipelines.clean import Dropped
from pipelines.documents import Part
from pipelines.sources import Quarantined
from pipelines.tally import EXAMPLES, IN_MANIFEST, Tally

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("keep"), st.integers(1, 99), st.sets(st.sampled_from(["unicode", "control_characters"]))),
        st.tuples(st.just("drop"), st.integers(1, 99), st.sampled_from(["min_document_chars", "language"])),
        st.tuples(st.just("quarantine"), st.integers(1, 99), st.just("no JSON")),
    ),
    max_size=60,
)


def count(events):
    tally = Tally()
    for number, (event, size, what) in events:
        if event == "keep":
            tally.keep(size, size - len(what), tuple(sorted(what)))
            tally.parts.append(Part(f"{number}", 0, "train", "text", 1, size))
            tally.files.append(f"{number}")
        elif event == "drop":
            tally.drop(size, Dropped(what, number), "file", number, "x" * size * 10)
        else:
            tally.put_in_quarantine(Quarantined("file", number, what, records=size))
    return tally


@given(EVENTS, st.data())
def test_counts_of_stretches_add_up_to_those_of_the_whole(events, data):
    numbered = list(enumerate(events))
    cut = data.draw(st.integers(0, len(events)))
    total, whole = count(numbered[:cut]), count(numbered)
    total.add(count(numbered[cut:]))
    assert total == whole
    dropped = [(size, what) for event, size, what in events if event == "drop"]
    assert whole.documents_in == whole.documents + len(dropped)
    assert {rule: drops.documents for rule, drops in whole.dropped.items()} == {
        rule: sum(what == rule for _, what in dropped) for rule in {what for _, what in dropped}
    }
    assert all(len(drops.examples) == min(EXAMPLES, drops.documents) for drops in whole.dropped.values())
    assert all(len(example["text"]) <= 200 for drops in whole.dropped.values() for example in drops.examples)
    unreadable = [size for event, size, _ in events if event == "quarantine"]
    assert whole.quarantined == sum(unreadable) and len(whole.quarantine) == min(IN_MANIFEST, len(unreadable))
    assert Tally.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_adding_leaves_what_was_added_alone():
    one, other = count([(0, ("drop", 1, "min_document_chars"))]), count([(1, ("drop", 2, "min_document_chars"))])
    total = Tally()
    for tally in (one, other):
        total.add(tally)
    assert (one, other) == (
        count([(0, ("drop", 1, "min_document_chars"))]),
        count([(1, ("drop", 2, "min_document_chars"))]),
    )
