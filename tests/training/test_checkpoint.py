"""Checkpoints: from any mesh onto any other, what is kept, and what is said of a wrong one."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_models import GPT2, build, on_devices, packed_batch, quick_jit, run_config, shard

from lm_jax.config import CheckpointConfig
from lm_jax.errors import UserError
from lm_jax.model import parameters as params_lib
from lm_jax.training.checkpoint import Checkpoints, abstract_parameters
from lm_jax.training.step import TrainState, make_step, skeleton_of

SMALL = dataclasses.replace(GPT2, init_std=0.05)
MESHES = [(1, 1, 1), (4, 2, 1), (2, 2, 2)]
CONFIG = run_config(SMALL, optimizer={"warmup_steps": 3, "learning_rate": 0.003})
KEEP_ALL = CheckpointConfig(keep=99)
PLACE = {"lanes": {"0": {"next": 17, "rest": [1, 2]}, "1": None}, "skipped": 3}


@functools.cache
def updater(axes: tuple[int, int, int]):
    """The compiled step for a mesh, and its state's abstract form."""
    with jax.set_mesh(on_devices(axes)):
        step = make_step(CONFIG)
        return quick_jit(step.train), jax.eval_shape(step.init)


def go_on(state: TrainState, axes, start: int, steps: int) -> tuple[TrainState, list[float]]:
    update, losses = updater(axes)[0], []
    with jax.set_mesh(on_devices(axes)):
        for i in range(start, start + steps):
            state, metrics = update(state, shard(packed_batch(seed=i)))
            losses.append(float(metrics["loss"]))
    return state, losses


def fresh(axes) -> TrainState:
    with jax.set_mesh(on_devices(axes)):
        placed = {
            name: jax.device_put(np.asarray(x), updater(axes)[1].parameters[name].sharding.spec)
            for name, x in params_lib.split(build(SMALL)).items()
        }
        return quick_jit(make_step(CONFIG).init_from)(placed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with step 2 of a run on 2 x 2 x 2 devices, its state, and the losses after it."""
    workdir = str(tmp_path_factory.mktemp("run"))
    state, _ = go_on(fresh((2, 2, 2)), (2, 2, 2), 0, 2)
    with Checkpoints(workdir, KEEP_ALL) as checkpoints:
        checkpoints.save(2, state, PLACE)
    return workdir, state, go_on(state, (2, 2, 2), 2, 3)[1]


def assert_same(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("axes", MESHES)
def test_a_run_goes_on_alike_on_any_mesh(saved, axes):
    workdir, state, losses = saved
    abstract = updater(axes)[1]
    with Checkpoints(workdir) as checkpoints:
        restored, place = checkpoints.restore(2, abstract, on_devices(axes))
    assert place == PLACE
    assert_same(restored, state)
    for name, x in restored.parameters.items():
        assert x.sharding.mesh.shape == on_devices(axes).shape
        assert x.sharding.is_equivalent_to(
            jax.NamedSharding(on_devices(axes), abstract.parameters[name].sharding.spec), x.ndim
        )
    np.testing.assert_allclose(go_on(restored, axes, 2, 3)[1], losses, atol=1e-4)


def test_each_process_notes_what_it_wrote_and_none_of_it_is_needed(saved, tmp_path):
    """Of several, the first compares the notes; older checkpoints have none."""
    workdir, state, _ = saved
    older = shutil.copytree(workdir, tmp_path / "older")
    for item in ("parameters", "optimizer"):
        notes = older / "checkpoints" / "2" / item / "array_metadatas"
        (note,) = notes.iterdir()
        names = {x["array_metadata"]["param_name"] for x in json.loads(note.read_text())[
            "array_metadatas"]}  # fmt: skip
        assert names >= set(state.parameters) if item == "parameters" else names
        shutil.rmtree(notes)
    with Checkpoints(str(older)) as checkpoints:
        restored, _ = checkpoints.restore(2, updater(MESHES[0])[1], on_devices(MESHES[0]))
    assert_same(restored, state)


@pytest.mark.parametrize("axes", MESHES[:2])
def test_from_any_mesh_onto_another(tmp_path, axes):
    state = fresh(axes)
    with Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints:
        checkpoints.save(0, state, {"lanes": {}})
        checkpoints.wait()
        restored, _ = checkpoints.restore(0, updater((2, 2, 2))[1], on_devices((2, 2, 2)))
    assert_same(restored, state)


def test_parameters_alone_onto_another_mesh(saved):
    workdir, state, _ = saved
    mesh = on_devices((1, 4, 2))
    abstract = abstract_parameters(skeleton_of(SMALL), mesh)
    with Checkpoints(workdir) as checkpoints:
        parameters = checkpoints.restore_parameters(2, abstract, mesh)
    assert_same(parameters, state.parameters)
    assert all(x.sharding.mesh.shape == mesh.shape for x in parameters.values())


def test_one_that_is_compressed_is_read_too(saved, tmp_path, monkeypatch):
    """As they were until they were not."""
    _, state, _ = saved
    handler = ocp.PyTreeCheckpointHandler

    def compressing(**how):
        return handler(**how | {"use_compression": True})

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "PyTreeCheckpointHandler", compressing)
        with Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints:
            checkpoints.save(2, state, PLACE)
    axes = (4, 2, 1)
    with jax.set_mesh(on_devices(axes)), Checkpoints(str(tmp_path)) as checkpoints:
        restored, _ = checkpoints.restore(2, updater(axes)[1], on_devices(axes))
    assert_same(restored, state)


@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 2, 1)])
def test_a_part_is_read_at_a_time(saved, monkeypatch, axes):
    """Of what this process has, however many of its devices have it."""
    asked, handler = [], ocp.PyTreeCheckpointHandler

    def noted(**how):
        asked.append(how.get("restore_concurrent_gb"))
        return handler(**how)

    monkeypatch.setattr(ocp, "PyTreeCheckpointHandler", noted)
    workdir, state, _ = saved
    with jax.set_mesh(on_devices(axes)), Checkpoints(workdir) as checkpoints:
        checkpoints.restore(2, updater(axes)[1], on_devices(axes))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    limits = [limit for limit in asked if limit]
    assert limits and limits == pytest.approx([0.25 * size / 1e9] * len(limits), rel=0.01)


def test_a_save_outlives_the_arrays_it_was_made_of(tmp_path):
    """They are donated to the next step while the save is still being written."""
    state = fresh((1, 1, 1))
    want = jax.tree.map(np.array, state)
    with Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints:
        checkpoints.save(0, state, {"lanes": {}})
        for x in jax.tree.leaves(state):
            x.delete()
        checkpoints.wait()
        restored, _ = checkpoints.restore(0, updater((1, 1, 1))[1], on_devices((1, 1, 1)))
    assert_same(restored, want)


def test_the_newest_are_kept_and_each_multiple(tmp_path):
    tiny = TrainState(np.int32(0), {"weight": np.ones(3, np.float32)}, {}, ())
    with Checkpoints(str(tmp_path), CheckpointConfig(keep=2, keep_every=4)) as checkpoints:
        assert checkpoints.latest() is None
        for step in range(1, 8):
            checkpoints.save(step, tiny, {"lanes": {}})
        checkpoints.wait()
        assert checkpoints.steps() == [4, 6, 7]
        assert checkpoints.latest() == 7


def test_choosing_a_step(saved, tmp_path):
    workdir, _, _ = saved
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.choose(None) == checkpoints.choose(2) == 2
        with pytest.raises(UserError, match=r"no checkpoint of step 3.*there are 2"):
            checkpoints.choose(3)
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpoints(str(tmp_path / "nowhere"))
    (tmp_path / "checkpoints").mkdir()
    with (
        Checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(UserError, match="no finished checkpoint"),
    ):
        checkpoints.choose(None)


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    tiny = TrainState(np.int32(0), {"weight": np.ones(3, np.float32)}, {}, ())
    with Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints:
        checkpoints.save(1, tiny, {"lanes": {}})
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (left / "parameters.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.latest() == 1
    assert left.exists()  # one who reads removes nothing: it may be a save under way
    with Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints:
        checkpoints.save(3, tiny, {"lanes": {}})
        checkpoints.wait()
        assert not left.exists()  # removed in the background, before the first save at the latest
        assert checkpoints.steps() == [1, 3]


def test_a_checkpoint_of_another_model_names_each_parameter(saved):
    workdir, _, _ = saved
    other = dataclasses.replace(
        SMALL, mlp_width=64, tied_head=False, qkv_bias=False, out_bias=False
    )
    mesh = on_devices((1, 1, 1))
    abstract = abstract_parameters(skeleton_of(other), mesh)
    with Checkpoints(workdir) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore_parameters(2, abstract, mesh)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert {line.partition(":")[0] for line in lines} == {
        "head",
        *(f"blocks.attention.{n}_bias" for n in ("query", "key", "value", "out")),
        *(f"blocks.mlp.{n}" for n in ("up", "down", "up_bias")),
    }
    assert "head: expected (32, 64), found nothing" in lines
    assert "blocks.mlp.up: expected (2, 32, 64), found (2, 32, 128)" in lines
    assert "blocks.attention.query_bias: expected nothing, found (2, 4, 8)" in lines


def test_a_model_that_the_mesh_does_not_divide_is_refused_before_it_is_read():
    with pytest.raises(UserError, match=r"mesh\.tensor = 8"):
        abstract_parameters(skeleton_of(SMALL), on_devices((1, 1, 8)))
