"""Every unit of a pool has one owner or none, and only its owner gives it away."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_jax.pool import Pool


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_units_but_the_null_one_are_given_out(count):
    pool = Pool("pages", count)
    taken = [pool.take("a") for _ in range(count - 1)]
    assert sorted(taken) == list(range(1, count))
    assert (pool.free, pool.count, pool.take("a")) == (0, count, None)
    assert pool.owners() == dict.fromkeys(taken, "a")


@pytest.mark.parametrize("count", [0, -1])
def test_a_pool_without_the_null_unit_is_refused(count):
    with pytest.raises(ValueError, match="at least 1 unit of slots"):
        Pool("slots", count)


def test_a_unit_comes_back_once_and_from_its_owner_only():
    pool = Pool("slots", 4)
    unit = pool.take("a")
    with pytest.raises(ValueError, match="held by 'a'"):
        pool.give_back(unit, "b")
    pool.give_back(unit, "a")
    with pytest.raises(ValueError, match="which is free"):
        pool.give_back(unit, "a")
    with pytest.raises(ValueError, match="which is free"):
        pool.transfer(unit, "a", "b")


@pytest.mark.parametrize("unit", [0, -1, 4, 99])
def test_a_unit_out_of_range_is_refused(unit):
    pool = Pool("slots", 4)
    for act in (lambda: pool.give_back(unit, "a"), lambda: pool.transfer(unit, "a", "b")):
        with pytest.raises(ValueError, match="out of the range 1 to 3"):
            act()


def test_a_unit_handed_on_belongs_to_the_new_owner():
    pool = Pool("slots", 4)
    unit = pool.take("a")
    pool.transfer(unit, "a", "b")
    for act in (lambda: pool.give_back(unit, "a"), lambda: pool.transfer(unit, "a", "c")):
        with pytest.raises(ValueError, match="held by 'b'"):
            act()
    pool.give_back(unit, "b")
    assert pool.free == 3


def test_the_unit_given_back_last_is_taken_first():
    pool = Pool("slots", 5)
    assert [pool.take("a") for _ in range(3)] == [1, 2, 3]
    pool.give_back(1, "a"), pool.give_back(3, "a")
    assert [pool.take("a") for _ in range(3)] == [3, 1, 4]


def test_the_copy_of_owners_is_nobodys_handle():
    pool = Pool("slots", 3)
    pool.take("a")
    pool.owners().clear()
    assert len(pool.owners()) == 1


@given(st.lists(st.tuples(st.sampled_from(["take", "give", "hand"]), st.integers(0, 5), st.sampled_from("abc"))))
def test_a_pool_is_a_dict_of_owners(acts):
    pool, again, model = Pool("pages", 6), Pool("pages", 6), {}
    for act, unit, owner in acts:
        if act == "take":
            got = pool.take(owner)
            assert got == again.take(owner), "the same calls give the same units"
            assert (got is None) == (len(model) == 5) and got not in {*model, 0}
            model.update({got: owner} if got else {})
        elif model.get(unit) == owner:
            for each in (pool, again):
                each.give_back(unit, owner) if act == "give" else each.transfer(unit, owner, "d")
            model.pop(unit) if act == "give" else model.update({unit: "d"})
        else:
            with pytest.raises(ValueError, match=f"got unit {unit}"):
                pool.give_back(unit, owner) if act == "give" else pool.transfer(unit, owner, "d")
        assert pool.owners() == model and pool.free == 5 - len(model)
