"""Collectives of compiled text: each form of groups, each way to be asynchronous, once each."""

import numpy as np
import pytest

from lm_jax.planning.collectives import axes_of, collectives, replica_groups
from lm_jax.planning.hlo import parse


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("{{10,11}}", [[10, 11]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['axis_0'=4] {'axis_0'}", [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_groups(text, groups):
    assert replica_groups(text, 4).tolist() == groups


def test_groups_of_another_form_raise():
    with pytest.raises(ValueError, match="not known"):
        replica_groups("everyone", 4)


def test_axes():
    sizes = {"data": 2, "fsdp": 4, "tensor": 1}
    assert axes_of(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), sizes) == ("fsdp",)
    assert axes_of(np.array([[0, 4]]), sizes) == ("data",)
    assert axes_of(np.arange(8)[None], sizes) == ("data", "fsdp")
    assert axes_of(np.array([[0, 1], [2, 3]]), sizes) == ("fsdp",)  # a part of it


def found(entry: str, more: str = "", devices: int = 4):
    text = f"HloModule m\n\n{more}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{entry}\n}}\n"
    got = collectives(parse(text), devices)
    return [(c.kind, c.bytes, c.times, c.asynchronous) for c in got]


GROUPS = "replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"bf16[8,4]{{1,0}} all-gather(%p), channel_id=1, {GROUPS}", ("all-gather", 64, False)),
        (f"f32[2] reduce-scatter(%p), channel_id=1, {GROUPS}", ("reduce-scatter", 32, False)),
        (f"(f32[2], f32[3]) all-reduce(%p, %q), {GROUPS}", ("all-reduce", 20, False)),
        (f"f32[8] all-to-all(%p), channel_id=3, {GROUPS}", ("all-to-all", 32, False)),
        (
            "f32[8] collective-permute(%p), channel_id=3, source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 32, False),
        ),
        (
            f"(f32[2], f32[8]) all-gather-start(%p), channel_id=1, {GROUPS}",
            ("all-gather", 32, True),
        ),
        (f"f32[8] all-reduce-start(%p), channel_id=1, {GROUPS}", ("all-reduce", 32, True)),
        (
            "(f32[8], f32[8], u32[], u32[]) collective-permute-start(%p), channel_id=3,"
            " source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 32, True),
        ),
        (
            "(bf16[16]{0}, u32[], token[]) send(%p, %t), channel_id=6, is_host_transfer=true,"
            ' frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}',
            ("all-reduce", 32, True),
        ),
    ],
)
def test_each_kind(line, expected):
    kind, size, hidden = expected
    done = f"  %d = f32[8] {kind}-done(%c)\n" if hidden and "send" not in line else ""
    assert found(f"  %c = {line}\n{done}") == [(kind, size, 1, hidden)]


def test_what_passes_between_slices_has_no_groups():
    text = (
        '  %c = (f32[4], token[]) send(%p), frontend_attributes={_xla_megascale_transfer_type="X"}'
    )
    text = f"HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {{\n{text}\n}}\n"
    assert [c.groups for c in collectives(parse(text), 4)] == [None]


# As libtpu writes a gather that runs inside of products: begun, carried on and ended by fusions.
FUSED = """%begin (a: f32[2]) -> (f32[2], f32[8]) {
  %a = f32[2] parameter(0)
  %all-gather.1 = f32[8] all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %s = (f32[2], f32[8]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (a: f32[2]) -> f32[8] {
  %a = f32[2] parameter(0)
  ROOT %all-gather.2 = f32[8] all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}}
}

%end (a: f32[2]) -> f32[8] {
  %a = f32[2] parameter(0)
  %all-gather.3 = f32[8] all-gather(%a), channel_id=7, replica_groups={{0,1,2,3}}
  ROOT %d = f32[8] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}
"""
BEGIN = "  %f1 = (f32[2], f32[8]) fusion(%p), kind=kCustom, calls=%begin\n"
MIDDLE = "  %f2 = f32[8] fusion(%p), kind=kOutput, calls=%async_collective_fusion\n"
END = "  %f3 = f32[8] fusion(%p), kind=kCustom, calls=%end\n"


def test_one_spread_over_fusions_counts_once():
    assert found(BEGIN + MIDDLE + END, FUSED) == [("all-gather", 32, 1, True)]


def test_one_begun_before_a_loop_and_ended_in_it_counts_once():
    loop = (
        "%body (q: f32[2]) -> f32[8] {\n  %p = f32[2] parameter(0)\n"
        + END
        + "}\n\n%condition (q: f32[2]) -> pred[] {\n  %n = s32[] constant(3)\n}\n"
    )
    entry = BEGIN + "  %w = f32[8] while(%f1), condition=%condition, body=%body\n"
    assert found(entry, FUSED + "\n" + loop) == [("all-gather", 32, 1, True)]


def test_two_of_the_same_channel_are_two():
    """As those that shard_map writes."""
    line = "f32[8] all-gather(%p), channel_id=1, replica_groups=[1,4]<=[4]"
    assert len(found(f"  %a = {line}\n  %b = {line}\n")) == 2


def test_what_another_core_does_is_asynchronous():
    more = """%async (a: f32[2]) -> f32[8] {
  %a = f32[2] parameter(0)
  ROOT %g = f32[8] all-gather(%a), channel_id=2, replica_groups=[1,4]<=[4]
}, execution_thread="sparsecore"
"""
    entry = """  %s = ((f32[2]), f32[8], u32[]) async-start(%p), calls=%async
  %u = ((f32[2]), f32[8], u32[]) async-update(%s), calls=%async
  %d = f32[8] async-done(%u), calls=%async"""
    assert found(entry, more) == [("all-gather", 32, 1, True)]


def test_a_reduction_that_keeps_a_part_is_a_reduce_scatter():
    more = """%all-reduce-scatter.1 (a: f32[8]) -> f32[2] {
  %a = f32[8] parameter(0)
  %r = f32[8] all-reduce(%a), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %d = f32[2] dynamic-slice(%r, %a), dynamic_slice_sizes={2}
}
"""
    entry = "  %f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    assert found(entry, more) == [("reduce-scatter", 32, 1, False)]


def test_a_loop_s_collective_counts_as_often_as_it_runs():
    more = """%body (q: f32[2]) -> f32[8] {
  %q = f32[2] parameter(0)
  %g = f32[8] all-gather(%q), channel_id=2, replica_groups=[1,4]<=[4]
}

%condition (q: f32[2]) -> pred[] {
  %n = s32[] constant(3)
}
"""
    entry = "  %w = f32[8] while(%p), condition=%condition, body=%body"
    assert found(entry, more) == [("all-gather", 32, 3, False)]
