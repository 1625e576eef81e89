from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from pipelines.mixture import Claim, Take, divide, take_parts

WEIGHTS = st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 2.0, 7.0, 1e6])
LIMITS = st.one_of(st.none(), st.integers(0, 60))


@st.composite
def corpora(draw):
    """Of each source its claim and its parts; of each part its documents' amounts."""
    parts = st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=12)
    sources = draw(st.lists(st.tuples(st.builds(Claim, WEIGHTS, LIMITS), parts), min_size=1, max_size=4))
    return [claim for claim, _ in sources], [parts for _, parts in sources]


def filled_slowly(budget, claims, totals):
    """Shares as water finds its level: all that are not full rise at the speed of their weights, event by event."""
    pairs = zip(claims, totals, strict=True)
    ceilings = [total if claim.at_most is None else min(total, claim.at_most) for claim, total in pairs]
    levels = [Fraction(0)] * len(claims)
    left = Fraction(sum(ceilings) if budget is None else budget)
    while left and (rising := [i for i in range(len(claims)) if levels[i] < ceilings[i]]):
        weight = sum(Fraction(claims[i].weight) for i in rising)
        times = [(ceilings[i] - levels[i]) / Fraction(claims[i].weight) for i in rising]
        time = min(*times, left / weight)
        for i in rising:
            levels[i] += time * Fraction(claims[i].weight)
        left -= time * weight
    return levels


class Corpus:
    def __init__(self, parts):
        self.parts = parts
        self.runs = []

    def run(self, takes):
        self.runs.append(list(takes))
        return [self.read(take) for take in takes]

    def read(self, take):
        documents = self.parts[take.source][take.index]
        if take.limit is None:
            return documents
        return documents[: prefix(documents, take.limit)]


def prefix(amounts, limit):
    return max(n for n in range(len(amounts) + 1) if sum(amounts[:n]) <= limit)


@given(st.one_of(st.none(), st.integers(1, 150)), corpora())
def test_shares_are_where_the_water_stands(budget, corpus):
    claims, parts = corpus
    totals = [sum(map(sum, each)) for each in parts]
    assert divide(budget, claims, totals) == filled_slowly(budget, claims, totals)


@given(st.one_of(st.none(), st.integers(1, 150)), corpora(), st.data())
def test_each_source_gives_the_longest_prefix_that_fits_its_share(budget, corpus, data):
    claims, parts = corpus
    sizes = [[data.draw(st.integers(0, 40)) for _ in each] for each in parts]
    reader = Corpus(parts)
    taken = take_parts(budget, claims, sizes, reader.run, sum)
    shares = filled_slowly(budget, claims, [sum(map(sum, each)) for each in parts])
    for source, (share, found) in enumerate(zip(shares, taken, strict=True)):
        documents = [amount for part in parts[source] for amount in part]
        assert [amount for _, result in found for amount in result] == documents[: prefix(documents, share)]
        assert [take.index for take, _ in found] == list(range(len(found)))
        assert all(take.limit is None for take, _ in found[:-1])
    run = [take for wave in reader.runs for take in wave]
    assert len(set(run)) == len(run)
    everything = [[Take(number, index) for index in range(len(each))] for number, each in enumerate(parts)]
    if budget is None and all(claim.at_most is None for claim in claims):
        assert [[take for take, _ in found] for found in taken] == everything
        assert len(reader.runs) <= 1


@given(st.integers(1, 150), corpora(), st.data())
def test_estimates_do_not_show(budget, corpus, data):
    claims, parts = corpus

    def taken():
        sizes = [[data.draw(st.integers(0, 1000)) for _ in each] for each in parts]
        return take_parts(budget, claims, sizes, Corpus(parts).run, sum)

    assert taken() == taken()


def test_little_is_run_in_vain():
    """1,000 parts a source, of which the budget needs 100 and 300; a part comes to four times its estimate."""
    reader = Corpus([[[4] * 10] * 1000, [[4] * 10] * 1000])
    taken = take_parts(16_000, [Claim(1), Claim(3)], [[10] * 1000] * 2, reader.run, sum)
    assert [len(found) for found in taken] == [100, 300]
    assert sum(len(wave) for wave in reader.runs) == 400
    assert len(reader.runs) <= 4


def test_a_source_of_which_nothing_stays_is_not_read_all_at_once():
    reader = Corpus([[[]] * 500 + [[5]] * 500, [[5]] * 1000])
    taken = take_parts(100, [Claim(), Claim()], [[5] * 1000] * 2, reader.run, sum)
    assert [sum(sum(result) for _, result in found) for found in taken] == [50, 50]
    assert len([take for wave in reader.runs for take in wave if take.source == 0]) <= 1000
    assert len(reader.runs) >= 7


def test_the_rest_of_a_part_that_is_dropped_counts_as_read():
    """A source that ends before its share is full counts to the end, and one that fills it not a part further."""
    parts = [[[3], []], [[2, 2], [], [2]]]
    taken = take_parts(7, [Claim(), Claim()], [[1, 1], [1, 1, 1]], Corpus(parts).run, sum)
    assert [[take for take, _ in found] for found in taken] == [[Take(0, 0), Take(0, 1)], [Take(1, 0)]]
