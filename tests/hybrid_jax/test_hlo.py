"""Collectives and copies as read off HLO: loops by their trips, the dearest branch, started ones by their result."""

import pytest

from hybrid_jax.hlo import Collective, collectives, count_copies

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %r = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%known (p: bf16[4]) -> bf16[4] {
  %g = (bf16[4]{0}, bf16[8]{0:T(128)(2,1)S(1)}) all-gather-start(%p), channel_id=2, dimensions={0}
  %h = bf16[8]{0:T(128)} all-gather-done(%g)
}

%small (p: f32[2]) -> f32[2] {
  %t = f32[2]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%large (p: f32[2]) -> f32[2] {
  %t.1 = f32[2]{0} collective-permute(%p), source_target_pairs={{0,1}}
  %t.2 = (f32[4]{0}, f32[4]{0}) all-to-all(%p, %p), replica_groups={{0,1}}
}

%loop (p: f32[8,16]) -> f32[8,16] {
  %f = f32[8,16]{1,0} fusion(%p), kind=kCustom, calls=%fused
  %w = bf16[4]{0} while(%p), condition=%cond, body=%known, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[2]{0} conditional(%i, %p, %p), branch_computations={%small, %large}
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %copy.1 = f32[2,9,4]{2,1,0:T(8,128)} copy(%p)
  %copy-start.2 = (bf16[2,9,4]{2,1,0}, bf16[2,9,4]{2,1,0}, u32[]{:S(2)}) copy-start(%p)
  %copy.3 = f32[9,4]{1,0} copy(%p)
  ROOT %w.1 = f32[8,16]{1,0} while(%p), condition=%cond, body=%loop
}
"""


def test_collectives_count_as_often_as_they_run():
    assert set(collectives(TEXT)) == {
        Collective("all-reduce", 1, 8 * 16 * 4),
        Collective("all-gather", 3, 3 * 8 * 2),
        Collective("collective-permute", 1, 8),
        Collective("all-to-all", 1, 32),
    }
    assert collectives(TEXT)[0].kind == "all-reduce"


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("no program")


def test_copies_are_of_whole_arrays_of_the_shape_and_dtype():
    assert count_copies(TEXT, [((2, 9, 4), "float32")]) == 1
    assert count_copies(TEXT, [((2, 9, 4), "bfloat16"), ((2, 9, 4), "float32")]) == 2
    assert count_copies(TEXT, [((9, 5), "float32")]) == 0


@pytest.mark.parametrize(
    "kind, sent", [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 300), ("collective-permute", 100)]
)
def test_bytes_on_a_ring_of_four(kind, sent):
    assert Collective(kind, 1, 100).link_bytes(4) == sent
