"""The reader of compiled text, on small modules in XLA's own writing."""

import pytest

from lm_jax.planning.hlo import arrays_of, parse

MODULE = """HloModule jit_train, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], /*index=1*/f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %z = f32[8,4] get-tuple-element(%q), index=1
  %kernel = f32[8,4] custom-call(%z), custom_call_target="tpu_custom_call", frontend_attributes={m={
"notes":"}"
}}, metadata={op_name="jit(train)/kernel"}
  %inner = (s32[], f32[8,4]) while(%q), condition=%c2, body=%b2, backend_config=KNOWN
  ROOT %out = (s32[], f32[8,4]) tuple(%j, %kernel)
}

%c2 (p2: (s32[], f32[8,4])) -> pred[] {
  %p2 = (s32[], f32[8,4]) parameter(0)
  ROOT %true = pred[] constant(true)
}

%b2 (q2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  ROOT %q2 = (s32[], f32[8,4]) parameter(0)
}, execution_thread="other"

ENTRY %main (a: f32[8,4], b: bf16[3]) -> f32[8,4] {
  %a = f32[8,4] parameter(0), metadata={op_name="state.parameters[\\'head\\']"}
  %b = bf16[3] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]) while(%start), condition=%condition, body=%body
  ROOT %end = f32[8,4] get-tuple-element(%loop), index=1
}
""".replace("KNOWN", '{"known_trip_count":{"n":"5"}}')


def test_loops_multiply():
    module = parse(MODULE)
    times = {p.instruction.name: p.times for p in module.places()}
    assert (times["a"], times["kernel"], times["q2"]) == (1, 12, 60)
    assert module.unknown_loops() == 0
    assert "x" not in times  # what a reduction does to two numbers is no instruction of the step


def test_a_loop_without_a_limit_counts_once_and_is_told():
    module = parse(MODULE.replace('{"known_trip_count":{"n":"5"}}', "{}"))
    assert {p.instruction.name: p.times for p in module.places()}["q2"] == 12
    assert module.unknown_loops() == 1


def test_an_instruction_of_several_lines_ends_no_computation():
    body = parse(MODULE).computations["body"].instructions
    assert list(body) == ["q", "j", "z", "kernel", "inner", "out"]
    assert body["kernel"].op_name == "jit(train)/kernel"
    assert body["out"].root and body["out"].operands == ["j", "kernel"]


def test_names_and_operands():
    entry = parse(MODULE).computations["main"]
    assert entry.instructions["a"].op_name == "state.parameters['head']"
    assert [p.name for p in entry.parameters] == ["a", "b"]
    assert [u.name for u in entry.users["start"]] == ["loop"]
    assert entry.root.name == "end"


@pytest.mark.parametrize(
    ("shape", "size", "fast"),
    [
        ("f32[2,3]{1,0:T(8,128)}", 24, [False]),
        ("(bf16[4]{0:T(8)S(1)}, u32[], /*index=2*/pred[7])", 8 + 4 + 7, [True, False, False]),
        ("s4[6]", 3, None),
        ("f8e4m3fn[10]", 10, None),
        ("c64[2]", 16, None),
        ("token[]", 0, None),
        ("f32[<=5]", 20, None),
    ],
)
def test_sizes(shape, size, fast):
    arrays = arrays_of(shape)
    assert sum(a.bytes for a in arrays) == size
    if fast is not None:
        assert [a.fast for a in arrays] == fast


def test_a_text_without_an_entry_is_none():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing\n")
