"""The mesh, and that parameters, gradients and optimizer state lie on it as the rules say."""

import dataclasses
import math
import types
from collections.abc import Iterable
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import GPT2, LLAMA, on_devices, packed_batch, quick_jit, run_config, shard

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.model import parameters as params_lib
from lm_jax.sharding import mesh as mesh_lib
from lm_jax.sharding.mesh import (
    AXES,
    activation_spec,
    batch_block,
    batch_shards,
    check_parameters,
    make_mesh,
    parameter_spec,
)
from lm_jax.training.checkpoint import abstract_parameters
from lm_jax.training.loss import batch_loss
from lm_jax.training.program import check_batch
from lm_jax.training.step import TrainState, make_step, skeleton_of


@pytest.mark.parametrize(
    "asked, got",
    [
        ((-1, 1, 1), (8, 1, 1, 1, 1)),
        ((2, -1, 2), (2, 2, 2, 1, 1)),
        ((1, 8, -1), (1, 8, 1, 1, 1)),
        ((4, 2, 1), (4, 2, 1, 1, 1)),
        ((1, 1, 2, -1, 2), (1, 1, 2, 2, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(asked, got):
    mesh = make_mesh(MeshConfig(*asked))
    of_config = "data", "fsdp", "tensor", "sequence", "expert"
    assert tuple(mesh.shape[axis] for axis in of_config) == got
    assert mesh.axis_names == AXES
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))
    assert batch_shards(mesh) == got[0] * got[1] * got[4]


@pytest.mark.parametrize("asked", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (4, 4, 1), (16, -1, 1)])
def test_a_mesh_that_does_not_fit_names_its_numbers(asked):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(*asked))
    for part in (f"data {asked[0]}", f"fsdp {asked[1]}", f"tensor {asked[2]}", "8 device"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"length": 15}, r"data\.length = 15 .* mesh\.sequence = 2"),
        ({"batch_size": 9}, "9 rows .* 4 devices"),
    ],
)
def test_a_batch_that_the_mesh_does_not_divide_is_refused(changes, why):
    config = run_config(GPT2)
    for key, value in changes.items():
        setattr(config.data, key, value)
    with pytest.raises(UserError, match=why):
        check_batch(config, on_devices((2, 1, 1, 2, 2)))


def test_the_nodes_of_gpus_are_no_slices():
    """jax numbers both alike; but any axis may join nodes."""
    devices = [
        types.SimpleNamespace(
            platform="gpu", slice_index=i // 4, process_index=i // 4, id=i, device_kind="H100"
        )
        for i in range(8)
    ]
    with pytest.raises(UserError, match="not a multiple of the 2 slices"):
        tpus = [types.SimpleNamespace(**vars(d) | {"platform": "tpu"}) for d in devices]
        make_mesh(MeshConfig(data=1, fsdp=8), tpus)
    arranged = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "Mesh", lambda array, *_, **__: arranged.append(array))
        make_mesh(MeshConfig(data=1, fsdp=8), devices)
    assert sorted(d.id for d in arranged[0].flat) == list(range(8))


def test_each_parameter_that_the_mesh_does_not_divide_is_named():
    """Grouped keys and values are 2 heads, on 4 devices; 1001 pieces, on 4 devices."""
    skeleton = skeleton_of(dataclasses.replace(LLAMA, vocab_size=1001))
    with pytest.raises(UserError) as error:
        abstract_parameters(skeleton, on_devices((1, 2, 4)))
    _, *lines, advice = str(error.value).splitlines()
    named = {line.split(":")[0].strip() for line in lines}
    assert named == {"embedding", "head", "blocks.attention.key", "blocks.attention.value"}
    assert "'kv_heads' axis of 2" in str(error.value) and "mesh.tensor = 4" in str(error.value)
    # What would divide them: the width of 32, and 1001 and 2 heads.
    assert "8 devices, mesh.fsdp can be 1, 2, 4 or 8 and mesh.tensor can be 1:" in advice


@pytest.mark.parametrize("axes", [("embed", "unheard_of"), ("embed",)])
def test_a_parameter_without_a_rule_for_each_axis_is_a_defect(axes):
    with pytest.raises(ValueError, match="weight"):
        check_parameters({"weight": (8, 8)}, {"weight": axes}, on_devices((8, 1, 1)))


def test_a_skeleton_is_of_its_mesh_and_nobody_elses():
    """However often it is asked for, and on whatever other mesh before."""
    specs = set()
    for sizes in ({"fsdp": 8}, {"tensor": 2, "data": 4}, {"fsdp": 8}):
        mesh = make_mesh(MeshConfig(**{"data": 1} | sizes))
        with jax.set_mesh(mesh):
            one, other = skeleton_of(LLAMA), skeleton_of(LLAMA)
        up = one.blocks.mlp.up.get_value()
        assert up.sharding.mesh == mesh.abstract_mesh
        specs.add(up.sharding.spec)
        del one.blocks.mlp.up
        assert other.blocks.mlp.up.get_value() is not None
    assert len(specs) == 2
    assert skeleton_of(LLAMA).blocks.mlp.up.get_value().sharding is None
    changed = dataclasses.replace(LLAMA)
    before = skeleton_of(changed)
    changed.mlp_width *= 2  # as flags change a recipe's config
    assert skeleton_of(changed).blocks.mlp.up.get_value().shape != (
        before.blocks.mlp.up.get_value().shape
    )


def test_outside_of_a_mesh_nothing_is_sharded():
    assert activation_spec("batch") is None and parameter_spec("embed") is None


# By hand, and not from the rules: what data 2 x fsdp 2 x tensor 2 should give.
WANTED = {
    "embedding": P("tensor", "fsdp"),
    "head": P("fsdp", "tensor"),
    "position_embedding": P(None, "fsdp"),
    "blocks.attention.query": P(None, "fsdp", "tensor", None),
    "blocks.attention.key": P(None, "fsdp", "tensor", None),
    "blocks.attention.value": P(None, "fsdp", "tensor", None),
    "blocks.attention.out": P(None, "tensor", None, "fsdp"),
    "blocks.attention.query_bias": P(None, "tensor", None),
    "blocks.attention.key_bias": P(None, "tensor", None),
    "blocks.attention.value_bias": P(None, "tensor", None),
    "blocks.mlp.up": P(None, "fsdp", "tensor"),
    "blocks.mlp.gate": P(None, "fsdp", "tensor"),
    "blocks.mlp.down": P(None, "tensor", "fsdp"),
    "blocks.mlp.up_bias": P(None, "tensor"),
    "blocks.mlp.gate_bias": P(None, "tensor"),
}
MODEL = dataclasses.replace(
    LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, norm="layernorm", position="learned"
)


def placement(spec: P, x: jax.Array) -> tuple:
    return tuple(spec) + (None,) * (x.ndim - len(spec))


def lies_as_wanted(name: str, x: jax.Array) -> bool:
    actual = P() if x.sharding is None else x.sharding.spec
    return placement(actual, x) == placement(WANTED.get(name, P()), x)


def wrongly_placed(arrays: Iterable[tuple[str, jax.Array]]) -> set[str]:
    return {name for name, x in arrays if not lies_as_wanted(name, x)}


def moments(state: TrainState) -> list[tuple[str, jax.Array]]:
    """Arrays of the optimizer that are shaped as a parameter; their paths end in its name."""
    found = []
    for path, x in jax.tree.leaves_with_path(state.optimizer):
        name = str(getattr(path[-1], "key", ""))
        if name in state.parameters and x.shape == state.parameters[name].shape:
            found.append((name, x))
    return found


def test_parameters_gradients_and_moments_lie_as_the_rules_say():
    """Of real arrays; the types that the next test looks at are what these follow from."""
    skeleton = skeleton_of(MODEL)

    def gradients(parameters, batch):
        loss = lambda p: batch_loss(params_lib.bind(skeleton, p), batch).loss  # noqa: E731
        return jax.grad(loss)(parameters)

    with jax.set_mesh(on_devices((2, 2, 2))):
        step, batch = make_step(run_config(MODEL)), shard(packed_batch())
        state = quick_jit(step.init)()
        assert WANTED.keys() <= state.parameters.keys()
        assert not wrongly_placed(state.parameters.items())
        assert not wrongly_placed(quick_jit(gradients)(state.parameters, batch).items())
        state, _ = quick_jit(step.train)(state, batch)
        assert not wrongly_placed(state.parameters.items())
        assert not wrongly_placed(moments(state))


@pytest.mark.parametrize(
    "name, copies", [("adamw", 2), ("lion", 1), ("adafactor", 0.5), ("muon", 1)]
)
def test_each_optimizers_moments_lie_as_the_rules_say(name, copies):
    with jax.set_mesh(on_devices((2, 2, 2))):
        step, batch = make_step(run_config(MODEL, optimizer={"name": name})), shard(packed_batch())
        fresh = jax.eval_shape(step.init)
        after, _ = jax.eval_shape(step.train, fresh, batch)
    for state in (fresh, after):
        assert len(moments(state)) >= copies * len(state.parameters)
        assert not wrongly_placed([*state.parameters.items(), *moments(state)])


def test_a_mesh_splits_the_memory_of_the_state():
    """Nothing large is whole on a device: with eight parts, one holds little over an eighth."""
    with jax.set_mesh(on_devices((1, 4, 2))):
        state = jax.eval_shape(make_step(run_config(GPT2)).init)
    arrays = jax.tree.leaves(state)
    parts = {None: 1, "data": 1, "fsdp": 4, "tensor": 2}
    here = sum(
        x.size / math.prod(parts[axis] for axis in x.sharding.spec) for x in arrays if x.sharding
    )
    assert here < sum(x.size for x in arrays) / 8 * 1.3


def mesh_of(processes: list[int], shape: tuple[int, ...]) -> SimpleNamespace:
    """What `batch_block` looks at of a mesh whose devices belong to these processes."""
    devices = np.array([SimpleNamespace(process_index=p) for p in processes], object)
    sizes = dict(zip(AXES, shape, strict=True))
    return SimpleNamespace(devices=devices.reshape(shape), shape=sizes, size=len(processes))


@pytest.mark.parametrize(
    "processes, shape, blocks",
    [
        ([0] * 4 + [1] * 4, (8, 1, 1, 1, 1), [(0, 2), (1, 2)]),
        ([0, 1, 0, 1], (2, 2, 1, 1, 1), [(0, 2), (1, 2)]),  # no neighbours along the rows
        ([1, 1, 0, 0], (2, 1, 2, 1, 1), [(1, 2), (0, 2)]),
        ([0] * 4 + [1] * 4, (1, 1, 1, 1, 8), [(0, 1), (0, 1)]),  # one row on both hosts
        ([0, 0, 1, 1, 2, 2, 3, 3], (2, 1, 1, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 0, 2, 2, 1, 1, 3, 3], (2, 1, 1, 1, 4), [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(processes, shape, blocks):
    mesh = mesh_of(processes, shape)
    assert [batch_block(mesh, process) for process in sorted(set(processes))] == blocks


def test_rows_that_overlap_in_part_are_refused():
    with pytest.raises(UserError, match=r"mesh.data 3 x mesh.tensor 2.*2 processes"):
        batch_block(mesh_of([0, 0, 0, 1, 1, 1], (3, 1, 1, 1, 2)), 0)
