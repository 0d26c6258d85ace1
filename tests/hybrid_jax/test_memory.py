"""The memory model: the budget is kept, more memory is never worse, and every refusal names what is then accepted."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.memory import (
    GIB,
    MOST_REQUESTS,
    Limits,
    ModelSizes,
    estimate_temporaries,
    format_bytes,
    parts_bytes,
    plan_memory,
)

MIB = 2**20
HYBRID = ModelSizes(
    positions=262144, vocabulary=150_000, weights_bytes=8 * GIB, token_bytes=36 << 10, request_bytes=50 * MIB,
    step_token_bytes=200_000,
)  # fmt: skip


def plan_text(sizes, memory_bytes, limits):
    """The message of the refusal."""
    with pytest.raises(ValueError) as refused:
        plan_memory(sizes, memory_bytes, limits)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------------------ examples


def test_a_plan_by_hand():
    sizes = ModelSizes(4096, 100, 1000, token_bytes=2, request_bytes=50, step_token_bytes=3)
    limits = Limits(max_model_len=128, max_num_seqs=3, max_num_batched_tokens=512, memory_fraction=1.0)
    plan = plan_memory(sizes, 10**9, limits)
    assert (plan.pages, plan.slots) == (3 * 2 * 2 + 1, 3 * 3 + 1)
    assert plan.pages_bytes == 13 * 64 * 2 and plan.slots_bytes == 10 * 50 and plan.rows_bytes == 4 * 100 * 8
    assert plan.temporaries_bytes == 512 * 3 + 4 * 100 * 24  # three rows run as four
    assert plan.total_bytes == 1000 + 1664 + 500 + 3200 + 11136 == sum(parts_bytes(plan).values())
    assert (plan.requests_by_slots, plan.requests_by_pages(128), plan.requests_by_pages(65)) == (9, 6, 6)
    assert (plan.limiting, plan.snapshot_slots, plan.cacheable_tokens) == ("max_num_seqs", 6, 128)


def test_temporaries_by_hand():
    sizes = ModelSizes(1, 10, 0, 0, 0, step_token_bytes=7, gathered_token_bytes=5, gathered_request_bytes=11)
    assert estimate_temporaries(sizes, 64, 3, 40, 16) == 64 * 7 + 4 * (10 * 24 + 11 + 4 * 16 * 5)


def test_compiled_temporaries_replace_the_estimate():
    assert plan_memory(HYBRID, 80 * GIB, Limits(), temporaries_bytes=12345).temporaries_bytes == 12345


def test_memory_is_used_in_the_order_of_urgency():
    limits = Limits(max_model_len=8192, max_num_seqs=8, memory_fraction=1.0)
    least = plan_memory(HYBRID, needed_bytes(), limits)
    assert (least.slots, least.pages) == (9, 129)
    seen = [plan_memory(HYBRID, least.total_bytes + extra * MIB, limits) for extra in range(0, 6000, 2)]
    marks = ((p.pages > 129, p.pages >= 257, p.slots >= 17, p.slots >= 25, p.pages > 257) for p in seen)
    stages = list(dict.fromkeys(marks))
    rising = [(False,) * 5, (True,) + (False,) * 4, (True, True, False, False, False)]
    rising += [(True, True, True, False, False), (True,) * 4 + (False,), (True,) * 5]
    assert stages == rising
    assert (seen[-1].slots, seen[-1].pages) == (25, 8 * 128 * 2 + 1)  # and no more, however much there is


def needed_bytes():
    """Bytes of the least plan of the example, by hand."""
    pages, slots = 129 * 64 * HYBRID.token_bytes, 9 * HYBRID.request_bytes
    rows, temporaries = 9 * 150_000 * 8, 2048 * 200_000 + 8 * 150_000 * 24
    return HYBRID.weights_bytes + pages + slots + rows + temporaries


def test_a_small_model_leaves_a_large_device_free():
    sizes = ModelSizes(1024, 8192, 15 * MIB, 384, 393216, 40_000)
    plan = plan_memory(sizes, 80 * GIB, Limits())
    assert plan.max_num_seqs == MOST_REQUESTS and plan.total_bytes < GIB
    assert plan.pages == 256 * 16 * 2 + 1 and plan.slots == 3 * 256 + 1
    assert plan_memory(sizes, 80 * GIB, Limits(prefix_caching=False)).pages == 256 * 16 + 1
    assert plan_memory(sizes, 80 * GIB, Limits(prefix_caching=False)).slots == 257


def test_more_requests_than_state_slots_is_said_with_the_number_to_set():
    text = plan_text(HYBRID, 80 * GIB, Limits(max_num_seqs=64, slots=24))
    assert text.startswith("wanted max_num_seqs up to 23, got 64") and "of slots 24 one is null" in text
    assert text.endswith("set max_num_seqs 23 or slots 65")
    text = plan_text(HYBRID, 12 * GIB, Limits(max_num_seqs=64))
    found = int(re.search(r"set max_num_seqs (\d+)$", text)[1])
    assert plan_memory(HYBRID, 12 * GIB, Limits(max_num_seqs=found)).slots == found + 1
    with pytest.raises(ValueError, match="a state slot for each running"):
        plan_memory(HYBRID, 12 * GIB, Limits(max_num_seqs=found + 1))


def test_a_length_that_nobody_asked_for_is_not_to_blame():
    sizes = replace(HYBRID, gathered_token_bytes=16 << 10)
    assert plan_text(sizes, 80 * GIB, Limits(max_num_seqs=1000)).startswith("wanted max_num_seqs up to")
    assert plan_text(sizes, 19 * GIB // 2, Limits()).startswith("wanted max_model_len up to")


def test_slots_given_set_the_requests():
    assert plan_memory(HYBRID, 80 * GIB, Limits(slots=25)).max_num_seqs == 8
    assert plan_memory(HYBRID, 80 * GIB, Limits(slots=25, prefix_caching=False)).max_num_seqs == 24
    assert plan_memory(HYBRID, 80 * GIB, Limits(slots=2)).max_num_seqs == 1
    assert plan_memory(HYBRID, 80 * GIB, Limits(slots=25, max_num_seqs=24)).slots == 25


@pytest.mark.parametrize(
    "limits, message",
    [
        (Limits(max_model_len=300_000), "wanted max_model_len up to 262144, got 300000: the model reads 262144"),
        (Limits(max_model_len=4096, pages=33), "wanted max_model_len up to 2048, got 4096: pages 33.*or pages 65$"),
        (Limits(pages=33), "wanted max_model_len up to 2048, got 8192"),  # the default is not lowered in silence
        (Limits(slots=10**6), r"wanted slots up to \d+, got 1000000"),
        (Limits(pages=10**6), r"wanted pages up to \d+, got 1000000"),
        (Limits(max_num_batched_tokens=2**20), r"wanted max_num_batched_tokens up to \d+"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(HYBRID, 80 * GIB, limits)


def test_a_length_that_does_not_fit_the_memory():
    text = plan_text(HYBRID, 12 * GIB, Limits(max_model_len=200_000))
    found = int(re.search(r"set max_model_len (\d+)$", text)[1])
    assert found % 64 == 0 and plan_memory(HYBRID, 12 * GIB, Limits(max_model_len=found)).pages == found // 64 + 1


def test_weights_that_do_not_fit():
    text = plan_text(HYBRID, 4 * GIB, Limits())
    needed = int(re.search(r"at least (\d+) bytes", text)[1])
    assert "the weights take 8.00 GiB" in text
    plan_memory(HYBRID, needed, Limits())
    plan_text(HYBRID, needed - 2, Limits())


def test_a_model_without_states():
    sizes = replace(HYBRID, request_bytes=0)
    plan = plan_memory(sizes, 80 * GIB, Limits(max_num_seqs=8))
    assert (plan.slots, plan.slots_bytes, plan.snapshot_slots) == (9, 0, 0)
    assert plan.cacheable_tokens == 8192
    assert plan_memory(sizes, 80 * GIB, Limits(max_num_seqs=8, page_size=16, max_model_len=100)).cacheable_tokens == 96


def test_a_model_without_pages():
    sizes = replace(HYBRID, token_bytes=0)
    plan = plan_memory(sizes, 80 * GIB, Limits())
    assert (plan.pages, plan.pages_bytes, plan.requests_by_pages(100)) == (0, 0, None)
    assert plan.max_num_seqs == MOST_REQUESTS and plan.limiting == "max_num_seqs" and plan.cacheable_tokens == 8192
    with pytest.raises(ValueError, match="leave pages unset"):
        plan_memory(sizes, 80 * GIB, Limits(pages=100))


def test_what_can_be_cached():
    def cacheable(**limits):
        return plan_memory(HYBRID, 80 * GIB, Limits(**limits)).cacheable_tokens

    assert cacheable(max_model_len=1000) == 960
    assert cacheable(max_model_len=1000, page_size=128) == 896
    assert cacheable(max_model_len=1000, page_size=48) == 960  # multiples of 192
    assert cacheable(max_model_len=1000, prefix_caching=False) == 0
    assert cacheable(max_model_len=1000, slots=2) == 0  # one slot, and it is live


def test_bytes_for_people():
    assert [format_bytes(size) for size in (512, 3 * 2**19, 5 * GIB)] == ["0.50 KiB", "1.50 MiB", "5.00 GiB"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_model_len": 0}, "max_model_len of at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs of at least 1"),
        ({"pages": 1}, "pages of at least 2"),
        ({"slots": 0}, "slots of at least 2"),
        ({"page_size": 0}, "page_size of at least 1"),
        ({"max_num_batched_tokens": 100}, "multiples of 64, got 100: set max_num_batched_tokens 64"),
        ({"memory_fraction": 1.5}, "up to 1"),
        ({"memory_fraction": float("nan")}, "up to 1"),
    ],
)
def test_limits_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Limits(**wrong)


# ---------------------------------------------------------------------------------------------------------- properties

SIZES = st.builds(
    ModelSizes,
    positions=st.integers(1, 1 << 20),
    vocabulary=st.integers(1, 1 << 18),
    weights_bytes=st.integers(0, 1 << 36),
    token_bytes=st.just(0) | st.integers(1, 1 << 17),
    request_bytes=st.just(0) | st.integers(1, 1 << 28),
    step_token_bytes=st.integers(0, 1 << 18),
    gathered_token_bytes=st.just(0) | st.integers(1, 1 << 14),
    gathered_request_bytes=st.just(0) | st.integers(1, 1 << 24),
)
LIMITS = st.builds(
    Limits,
    max_model_len=st.none() | st.integers(1, 1 << 20),
    max_num_seqs=st.none() | st.integers(1, 1000),
    pages=st.none() | st.integers(2, 1 << 16),
    slots=st.none() | st.integers(2, 3000),
    page_size=st.sampled_from([1, 16, 48, 64, 128]),
    max_num_batched_tokens=st.integers(1, 64).map(lambda chunks: 64 * chunks),
    memory_fraction=st.floats(0.1, 1.0),
    prefix_caching=st.booleans(),
)
MEMORY = st.integers(1, 1 << 38)


def heed(text, memory_bytes, limits):
    """What a refusal says, done: which flag it was about, the memory, and the limits."""
    if found := re.search(r"at least (\d+) bytes", text):
        return "memory", int(found[1]), limits
    if "leave pages unset" in text:
        return "no pages", memory_bytes, replace(limits, pages=None)
    flag, value = re.search(r"; set (\w+) (\d+)(?: or \w+ \d+)?$", text).groups()
    return flag, memory_bytes, replace(limits, **{flag: int(value)})


def met(sizes, memory_bytes, limits):
    """Memory and limits after all refusals have been heeded, and the flags that they named."""
    heard = []
    while True:
        try:
            plan_memory(sizes, memory_bytes, limits)
            return memory_bytes, limits, heard
        except ValueError as refused:
            flag, memory_bytes, limits = heed(str(refused), memory_bytes, limits)
        assert flag not in heard, f"{flag} is refused twice"
        heard.append(flag)


@given(SIZES, MEMORY, LIMITS)
def test_refusals_name_values_that_are_accepted(sizes, memory_bytes, limits):
    met(sizes, memory_bytes, limits)


@given(SIZES, MEMORY, LIMITS)
def test_one_wrong_wish_needs_one_change_and_the_value_is_the_greatest(sizes, memory_bytes, limits):
    memory_bytes, limits, _ = met(sizes, memory_bytes, limits)
    for flag, much in (("max_model_len", 1 << 22), ("max_num_seqs", 1 << 20), ("slots", 1 << 40)):
        _, after, heard = met(sizes, memory_bytes, replace(limits, **{flag: much}))
        assert len(heard) <= 1
        if heard == [flag]:
            with pytest.raises(ValueError):
                plan_memory(sizes, memory_bytes, replace(after, **{flag: getattr(after, flag) + 1}))


@given(SIZES, MEMORY, LIMITS)
def test_the_other_value_of_a_refusal_is_accepted_too(sizes, memory_bytes, limits):
    try:
        plan_memory(sizes, memory_bytes, limits)
    except ValueError as refused:
        if found := re.search(r" or (\w+) (\d+)$", str(refused)):
            plan_memory(sizes, memory_bytes, replace(limits, **{found[1]: int(found[2])}))


@given(SIZES, MEMORY, LIMITS)
def test_a_plan_keeps_its_budget_and_the_wishes(sizes, memory_bytes, limits):
    memory_bytes, limits, _ = met(sizes, memory_bytes, limits)
    plan = plan_memory(sizes, memory_bytes, limits)
    assert plan.total_bytes <= memory_bytes * limits.memory_fraction
    assert min(parts_bytes(plan).values()) >= 0
    for flag in ("max_model_len", "max_num_seqs", "pages", "slots"):
        assert getattr(limits, flag) in (None, getattr(plan, flag))
    assert plan.slots > plan.max_num_seqs >= 1 and 1 <= plan.max_model_len <= sizes.positions
    by_pages = plan.requests_by_pages(plan.max_model_len)
    assert by_pages is None if not sizes.token_bytes else by_pages >= 1
    assert plan.snapshot_slots >= 0 and 0 <= plan.cacheable_tokens <= plan.max_model_len


@given(SIZES, MEMORY, LIMITS, st.integers(0, 1 << 34))
def test_more_memory_is_never_worse(sizes, memory_bytes, limits, more_bytes):
    memory_bytes, limits, _ = met(sizes, memory_bytes, limits)
    less, more = (plan_memory(sizes, size, limits) for size in (memory_bytes, memory_bytes + more_bytes))
    assert less.max_num_seqs <= more.max_num_seqs and less.slots <= more.slots
    assert less.total_bytes <= more.total_bytes
    if less.max_num_seqs == more.max_num_seqs:
        assert less.pages <= more.pages
