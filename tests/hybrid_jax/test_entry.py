"""The line of those that wait, and what an entry says of itself."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hybrid_jax.entry import MAX_OVERTAKES, Entry, WaitingLine
from hybrid_jax.request import SamplingParams, make_request


def make_entry(arrival, priority=0, prompt=(1, 2, 3), limit=5):
    params = SamplingParams(max_tokens=limit, seed=0)
    return Entry(make_request(str(arrival), prompt, params, 1000, priority=priority), arrival)


def take_all(line):
    taken = []
    while (entry := line.first()) is not None:
        line.admit(entry)
        taken.append(entry.arrival)
    return taken


def test_the_most_urgent_go_first_and_the_oldest_of_those():
    line = WaitingLine()
    for arrival, priority in enumerate([0, 5, -1, 0, -1]):
        line.add(make_entry(arrival, priority))
    assert len(line) == 5
    assert take_all(line) == [2, 4, 0, 3, 1]
    assert len(line) == 0 and line.first() is None


def test_one_that_comes_back_keeps_its_place():
    line = WaitingLine()
    first, second = make_entry(0), make_entry(1)
    line.add(first)
    line.admit(first)
    line.add(second)
    line.add(first)
    assert first in line and take_all(line) == [0, 1]


def test_one_that_leaves_is_not_met_again():
    line = WaitingLine()
    entries = [make_entry(arrival) for arrival in range(4)]
    for entry in entries:
        line.add(entry)
    line.remove(entries[0])
    line.remove(entries[2])
    assert entries[0] not in line and entries[1] in line
    assert take_all(line) == [1, 3]


@pytest.mark.parametrize("before", [0, 3, 10])
def test_nobody_is_overtaken_without_end(before):
    """The bound: those in line before, and `MAX_OVERTAKES` more."""
    line = WaitingLine()
    for arrival in range(before):
        line.add(make_entry(arrival, priority=-1))
    patient = make_entry(before, priority=9)
    line.add(patient)
    overtaken = 0
    for arrival in range(before + 1, 1000):
        line.add(make_entry(arrival, priority=-1))
        entry = line.first()
        line.admit(entry)
        if entry is patient:
            break
        overtaken += 1
    assert overtaken == before + MAX_OVERTAKES


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "remove", "return"]), st.integers(-2, 2)), max_size=300))
def test_every_entry_is_taken_once_within_the_bound(work):
    line, waits, out, arrivals, admissions = WaitingLine(), {}, [], 0, 0
    for what, priority in work:
        if what == "add" or (what == "return" and not out):
            entry, arrivals = make_entry(arrivals, priority), arrivals + 1
            waits[entry] = admissions + len(waits)
            line.add(entry)
        elif what == "return":
            entry = out.pop()
            waits[entry] = admissions + len(waits)
            line.add(entry)
        elif waits and what == "take":
            entry = line.first()
            assert entry in waits
            line.admit(entry)
            # Others may be due at the same time; they go one after another.
            assert admissions <= waits.pop(entry) + 2 * MAX_OVERTAKES + len(waits)
            admissions += 1
            out.append(entry)
        elif waits:
            entry = next(iter(waits))
            del waits[entry]
            line.remove(entry)
        assert len(line) == len(waits)
    assert sorted(take_all(line)) == sorted(entry.arrival for entry in waits)


def test_the_known_tokens_of_a_span():
    entry = make_entry(0, prompt=(1, 2, 3))
    entry.drawn = [7, 8]
    assert entry.tokens == [1, 2, 3, 7, 8]
    for start in range(6):
        for end in range(start, 6):
            assert entry.span(start, end) == tuple(entry.tokens[start:end])


def test_the_newest_token_is_not_fed():
    entry = make_entry(0)
    entry.target, entry.fed = 3, 2
    assert entry.prefilling and not entry.decodable and entry.fed_for_sure == 2
    entry.fed, entry.planned = 3, 1
    assert not entry.prefilling and entry.decodable and entry.fed_for_sure == 3
    entry.drawn, entry.fed, entry.planned = [7, 8], 6, 5  # planned further than known
    assert entry.fed_for_sure == 4 and not entry.decodable
