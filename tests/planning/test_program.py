"""A step compiled for the CPU devices that are there, against what is known about it."""

import dataclasses
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT, LLAMA, MOE, on_devices, run_config

from lm_jax.config import Config, ModelConfig, MoeConfig
from lm_jax.errors import UserError
from lm_jax.model import parameters as params_lib
from lm_jax.planning import command
from lm_jax.planning import program as program_lib
from lm_jax.planning import report as report_lib
from lm_jax.planning import search as search_lib
from lm_jax.planning.chips import CHIPS
from lm_jax.planning.collectives import axes_of, collectives
from lm_jax.planning.estimate import estimate, model_flops, rows_used
from lm_jax.planning.hlo import parse
from lm_jax.planning.program import compile_step
from lm_jax.planning.recipe import resolve
from lm_jax.planning.report import make_report, to_json, to_text
from lm_jax.planning.suggest import suggest
from lm_jax.planning.topology import Topology
from lm_jax.planning.work import Work, traced_work
from lm_jax.sharding.mesh import AXES
from lm_jax.training.program import abstract_batch, abstract_state, jit_train_step
from lm_jax.training.step import make_step

STEP = run_config(LLAMA)


@pytest.fixture(scope="module")
def sharded():
    """fsdp over 4 devices, data over 2."""
    return compile_step(STEP, on_devices((2, 4, 1)))


def in_layers(program, kind, axes):
    """Bytes of a step's collectives of the layers, which are run by a loop."""
    names = dict(program.mesh.shape)
    return sum(
        c.times * c.bytes
        for c in collectives(parse(program.text), program.mesh.size)
        if c.kind == kind and axes_of(c.groups, names) == axes and "while/body" in c.op_name
    )


def sizes(program, begin="", without=()):
    """Bytes of the parameters whose names begin and do not end so."""
    parameters = params_lib.split(program.step.skeleton)
    return sum(
        4 * x.size
        for name, x in parameters.items()
        if name.startswith(begin) and not name.endswith(without)
    )


def test_what_is_known_of_its_collectives(sharded):
    """Each matrix is gathered once and its gradient scattered once: with a loop that counts once,
    or parts of the same channel that count as one, the bytes would be fewer."""
    matrices = sizes(sharded, "blocks.", "scale")
    assert in_layers(sharded, "all-gather", ("fsdp",)) == matrices
    assert in_layers(sharded, "reduce-scatter", ("fsdp",)) == matrices
    assert in_layers(sharded, "all-reduce", ("data",)) == matrices / 4  # the parts, over the copies
    scales = sizes(sharded, "blocks.") - matrices
    assert in_layers(sharded, "all-reduce", ("data", "fsdp")) == scales


def test_memory_is_that_of_a_device(sharded):
    matrices = sizes(sharded, without="scale")
    assert sharded.memory.parameters == matrices / 4 + sizes(sharded) - matrices
    assert sharded.memory.optimizer == pytest.approx(2 * sharded.memory.parameters, abs=16)
    assert sharded.memory.temporaries > 0
    assert sharded.buffers[0].bytes >= sharded.buffers[-1].bytes > 0


def test_what_was_compiled_before_is_known_as_well(sharded):
    again = compile_step(STEP, sharded.mesh)
    assert (again.memory, again.buffers) == (sharded.memory, sharded.buffers)


def traced(config, mesh, masking=None):
    """The work of a step that is not compiled."""
    step = make_step(config, masking)
    state, batch = abstract_state(step, mesh), abstract_batch(config.data, mesh)
    with jax.set_mesh(mesh):
        return traced_work(jit_train_step(step, mesh).trace(state, batch)).total


def test_work_of_a_step_is_the_formula_s_and_what_is_computed_again(sharded):
    """Plain attention computes the whole square, and a narrow model has much of it."""
    model = model_flops(STEP, sharded)
    assert model < sharded.work.total < 1.5 * model
    assert sharded.work.total == traced(STEP, on_devices((1, 1, 1)))
    again = dataclasses.replace(STEP, model=dataclasses.replace(STEP.model, remat="full"))
    assert 1.15 < traced(again, on_devices((1, 1, 1))) / sharded.work.total < 1.35


def test_work_counts_loops_branches_and_parts():
    x = jnp.zeros((8, 8))

    def step(x):
        x, _ = jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda c: c @ c @ c, lambda c: c @ c, x)

    assert traced_work(jax.jit(step).trace(x)) == Work(2 * 8**3 * (5 + 2))
    with jax.set_mesh(on_devices((8, 1, 1))):
        P = jax.P
        parts = jax.shard_map(lambda c: c @ c.T, in_specs=P("data"), out_specs=P("data"))
        x = jax.device_put(x, P("data"))
        assert traced_work(jax.jit(parts).trace(x)).total == 8 * 2 * 8


def test_what_hosts_would_refuse_is_noted():
    """Hosts that a tensor axis joins read the same rows; lanes are shared by the others."""
    config = resolve(STEP, ())[0]

    def notes(axes, lanes, devices_a_host):
        mesh = on_devices(axes)
        hosts = np.array(
            [types.SimpleNamespace(process_index=i // devices_a_host) for i in range(8)]
        )
        there = types.SimpleNamespace(devices=hosts.reshape(mesh.devices.shape), shape=mesh.shape)
        config.data.lanes = lanes
        return report_lib._notes(config, types.SimpleNamespace(mesh=there))

    assert notes((8, 1, 1), 4, 2) == notes((2, 1, 4), 2, 2) == ()
    (note,) = notes((8, 1, 1), 2, 2)
    assert "4 different parts" in note and "--config.data.lanes=4" in note


def test_experts_count_by_the_rows_that_are_used():
    """8 experts, 2 for a token, 4 here: of its choices 1 is here, and there is room for both."""
    x, w = jnp.ones((24, 16)), jnp.ones((4, 16, 32))
    sizes = jnp.array([3, 3, 3, 3])

    def loss(x, w):
        return jnp.sum(jax.lax.ragged_dot(x, w, sizes))

    work = traced_work(jax.jit(jax.value_and_grad(loss, (0, 1))).trace(x, w))
    assert work == Work(experts=3 * 2 * 24 * 16 * 32)
    assert work.used(keys=1.0, rows=0.5).kernels == work.experts / 2
    config = Config(model=ModelConfig(moe=MoeConfig(experts=8, experts_per_token=2)))
    meshes = {n: types.SimpleNamespace(mesh=types.SimpleNamespace(shape={"expert": n}))
              for n in (1, 2, 8)}  # fmt: skip
    assert [rows_used(config, meshes[n]) for n in (1, 2, 8)] == [1.0, 0.5, 0.25]


def topology(hbm_gib=15.75):
    return Topology(dataclasses.replace(CHIPS["v5e"], hbm_gib=hbm_gib), (2, 4))


def test_an_estimate_never_exceeds_the_peak(sharded):
    module = parse(sharded.text)
    found = collectives(module, 8)
    e = estimate(STEP, topology(), sharded, module, found)
    assert 0 < e.fast <= e.slow and e.mfu[0] <= e.mfu[1] <= 1
    # With nothing else in the way, the FLOPs at the peak bound it.
    free = dataclasses.replace(sharded, work=Work(1e18))
    e = estimate(STEP, topology(), free, module, found)
    assert e.fast == pytest.approx(1e18 / 8 / 197e12, rel=0.01)


def test_the_report_says_the_same_in_both_forms(sharded):
    report = make_report(STEP, topology(), sharded)
    assert report.fits and not report.notes
    text, values = to_text(report), to_json(report)
    assert "data 2 x fsdp 4" in text and "of 15.75: fits" in text and "estimate" in text
    assert values["mesh"]["fsdp"] == 4 and values["memory_bytes"]["total"] == sharded.memory.total
    assert {c["kind"] for c in values["collectives"]} >= {"all-gather", "all-reduce"}
    low, high = values["estimate"]["mfu"]
    assert f"{low:.0%} to {high:.0%} MFU" in text


def test_a_suggestion_fits_and_is_not_more_than_needed():
    config = run_config(LLAMA, rows=256)
    mesh = on_devices((8, 1, 1))
    program = compile_step(config, mesh)
    memory = program.memory
    hbm = (memory.total - 0.6 * memory.temporaries) / 2**30
    report = make_report(config, topology(hbm), program)
    assert not report.fits
    report = suggest(report, None, list(mesh.devices.flat))
    assert report.suggestion is not None and report.suggestion.total <= report.hbm
    assert to_text(report).splitlines()[-1].strip() == " ".join(report.suggestion.flags)
    assert "data.batch_size" not in str(report.suggestion.flags)


def test_a_batch_that_no_mesh_can_split_is_a_message():
    with pytest.raises(UserError, match="do not divide over"):
        compile_step(run_config(LLAMA, rows=3), on_devices((8, 1, 1)))


def test_what_a_recipe_leaves_to_its_text_is_filled_in():
    config = run_config(LLAMA)
    config.model.vocab_size, config.data.sources = None, ()
    config.tokenizer.vocab_size = 5000
    resolved, masking = resolve(config)
    assert resolved.model.vocab_size == 5120 and masking is None
    assert config.model.vocab_size is None
    config.tokenizer.kind = "bytes"
    assert resolve(config)[0].model.vocab_size == 258
    config.tokenizer.kind = "characters"
    with pytest.raises(UserError, match=r"--config\.model\.vocab_size="):
        resolve(config)


def test_a_masked_step_needs_no_tokenizer():
    masked = {"objective": "masked", "mask_whole_words": True}
    config, masking = resolve(run_config(dataclasses.replace(BERT, pooler=False), data=masked))
    assert masking is not None and masking.starts_word_V is not None
    assert traced(config, on_devices((2, 2, 1)), masking) > 0


def test_out_of_memory_messages():
    said = "the total memory required for HLO temporaries (1.64T) exceeds available HBM (15.75G)."
    assert program_lib._needed(said) == int(1.64 * 2**40)
    assert program_lib._needed("Used 20.5G of 15.75G hbm.") == int(20.5 * 2**30)
    assert program_lib._needed("something else") is None


def test_largest_buffers():
    assignment = """BufferAssignment:
allocation 0: size 64, page 0, parameter 0, shape |f32[16]| at ShapeIndex {}:
 value: <1 p @0> (size=64,offset=0): f32[16]{0}
allocation 1: size 9000, page 0, preallocated-temp:
 value: <2 big @0> (size=4000,offset=0): f32[1000]{0}
 value: <3 small @0> (size=80,offset=4000): f32[20]{0}
 value: <4 big.2 @0> (size=4000,offset=5000): f32[1000]{0}
 value: <5 pair{} @0> (size=16,offset=4080): (f32[20], f32[20])
allocation 2: size 9000, color 1, page 0, preallocated-temp:
 value: <6 fast @0> (size=9000,offset=0): f32[2250]{0}
"""
    text = "\n".join(
        f'  %{n} = f32[4] add(%a, %b), metadata={{op_name="jit(train)/while/body/dot"}}'
        for n in ("big", "big.2")
    )
    got = [(b.bytes, b.shape, b.count, b.origin) for b in program_lib._buffers(assignment, text)]
    assert got == [(4000, "f32[1000]", 2, "while/dot"), (80, "f32[20]", 1, "small")]


def test_a_search_ranks_what_fits(monkeypatch):
    lines = []
    monkeypatch.setattr(search_lib, "_candidates", lambda *_: iter(CANDIDATES))
    devices = list(on_devices((8, 1, 1)).devices.flat)
    found = search_lib.search(STEP, topology(), devices, None, minutes=5, say=lines.append)
    rows = found.rows
    assert len(rows) == 2 and found.tried == found.candidates == len(lines) == 3
    assert search_lib.AS_IT_IS in lines[0] and "cannot be: mesh: data 3" in lines[2]
    assert rows[0].mfu[0] * rows[0].mfu[1] >= rows[1].mfu[0] * rows[1].mfu[1]
    assert {" ".join(row.flags) for row in rows} == {
        "",  # data 8 is the config as it is
        "--config.mesh.data=4 --config.mesh.fsdp=2",
    }
    assert command.table(found, topology(), 5).splitlines()[-1] == "3 of 3 tried"


def test_a_search_that_is_short_tries_the_config_and_then_another_mesh_each(monkeypatch):
    config = run_config(LLAMA, rows=64)
    config.mesh.data, config.mesh.tensor = 4, -1  # dear, but the user's own
    tried = []

    def compile_step(candidate, mesh, masking):
        tried.append((tuple(mesh.shape.values()), candidate))
        raise UserError("not now")

    monkeypatch.setattr(search_lib, "compile_step", compile_step)
    devices = list(on_devices((8, 1, 1)).devices.flat)
    found = search_lib.search(config, topology(), devices, None, minutes=5)
    meshes = [mesh for mesh, _ in tried]
    different = set(meshes)
    assert tried[0][1] == config and len(different) > 5
    first = meshes[1 : len(different) + 1]
    assert set(first) == different, "a mesh came twice before another came"
    assert len(set(map(str, tried))) == found.tried == found.candidates

    clock = itertools.count()  # a second each time that it is read
    monkeypatch.setattr(search_lib.time, "monotonic", lambda: next(clock))
    found = search_lib.search(config, topology(), devices, None, minutes=5 / 60)
    assert 0 < found.tried < 6 and not found.rows
    said = command.table(found, topology(), 2)
    assert f"{found.tried} of {found.candidates} tried in 2 minutes; --search_minutes" in said


def test_a_search_shares_experts_out_and_counts_all_of_them():
    config = run_config(MOE, rows=64)
    candidates = list(search_lib._candidates(config, topology()))
    assert {c["mesh.expert"] for c in candidates} >= {1, 2, 4}
    for c in candidates:
        assert math.prod(c[f"mesh.{axis}"] for axis in AXES) == 8
    # As many experts as fill a device, of which a token goes to one.
    config.model.moe.experts, config.model.moe.experts_per_token = 2**18, 1
    c = candidates[0] | {f"mesh.{axis}": 1 for axis in AXES}
    whole, shared = c | {"mesh.data": 8}, c | {"mesh.expert": 8}
    assert search_lib._cost(config, shared, topology()) < search_lib._cost(
        config, whole, topology()
    )
    assert search_lib._cost(config, whole, topology()) > 1e6


CANDIDATES = [
    {
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": 1,
        "mesh.sequence": 1,
        "mesh.expert": 1,
        "model.remat": "none",
        "training.accumulation": 1,
    }
    for data, fsdp in ((8, 1), (4, 2), (3, 2))  # the last cannot be
]


def test_candidates_of_a_search_divide_the_devices_and_the_batch():
    config, seen = run_config(LLAMA, rows=32), set()
    for changes in search_lib._candidates(config, topology()):
        axes = [changes[f"mesh.{a}"] for a in ("data", "fsdp", "tensor", "sequence")]
        assert math.prod(axes) == 8
        assert 32 % (changes["training.accumulation"] * axes[0] * axes[1]) == 0
        seen.add(tuple(changes.values()))
    assert len({s[5] for s in seen}) == 5 and len({s[2] for s in seen}) > 1
    costs = [search_lib._cost(config, c, topology()) for c in CANDIDATES[:2]]
    assert all(0 < c < 1 for c in costs)
