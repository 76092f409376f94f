"""Checkpoints that are damaged, or that could not be saved: what is lost, and what is said."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from tiny_models import GPT2, on_devices, run_config

from lm_jax.config import CheckpointConfig
from lm_jax.errors import Interrupted, UserError
from lm_jax.training import storage
from lm_jax.training.checkpoint import Checkpoints
from lm_jax.training.checkpoint_errors import Damaged, Unsaved
from lm_jax.training.step import TrainState, make_step

KEEP_ALL = CheckpointConfig(keep=99)
TINY = GPT2.__class__(vocab_size=7, layers=1, width=4, heads=1, mlp_width=4, max_length=16)
MESH = functools.partial(on_devices, (1, 1, 1))


@functools.cache
def abstract() -> TrainState:
    with jax.set_mesh(MESH()):
        return jax.eval_shape(make_step(run_config(TINY)).init)


def state_of(step: int) -> TrainState:
    """A state whose every number tells the step."""
    with jax.set_mesh(MESH()):
        return jax.tree.map(
            lambda x: jax.device_put(
                np.full(x.shape, step, x.dtype), x.sharding and x.sharding.spec
            ),
            abstract(),
        )


def place_of(step: int) -> dict:
    return {"lanes": {"0": {"next": step}}, "corpus": {"documents": [step]}}


@pytest.fixture
def workdir(tmp_path):
    with Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), place_of(step))
    return tmp_path


def newest(workdir):
    """The step that a run would go on from, which is checked to be what was saved there."""
    with Checkpoints(str(workdir), KEEP_ALL) as checkpoints:
        step, state, place = checkpoints.restore_newest(abstract(), MESH())
        jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
        assert place == place_of(step)
        assert checkpoints.steps() == list(range(1, step + 1))
        return step


def damage(workdir, step, pattern):
    """Turns a bit in the middle of each file that matches."""
    for path in (workdir / "checkpoints" / str(step)).glob(pattern):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("item", ["parameters", "optimizer"])
def test_a_bit_is_noticed_and_the_newest_that_is_intact_is_taken(workdir, capfd, item):
    damage(workdir, 3, f"{item}/**/d/*")
    with Checkpoints(str(workdir)) as checkpoints:
        with pytest.raises(Damaged, match=r"step 3 in .* is damaged"):
            checkpoints.restore(3, abstract(), MESH())
        assert checkpoints.steps() == [1, 2, 3]  # one who reads moves nothing
    assert newest(workdir) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "the run goes on from step 2" in said and "step 3" in said
    assert (workdir / "damaged" / "3" / item).is_dir()
    damage(workdir, 2, "data/*")
    assert newest(workdir) == 1


def test_where_all_are_damaged_none_is_taken_and_none_is_moved(workdir):
    for step in (1, 2, 3):
        damage(workdir, step, "parameters/**/d/*")
    with (
        Checkpoints(str(workdir), KEEP_ALL) as checkpoints,
        pytest.raises(UserError, match="no other to go on from") as e,
    ):
        checkpoints.restore_newest(abstract(), MESH())
    assert all(f"step {step} in" in str(e.value) for step in (1, 2, 3))
    assert len(list((workdir / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("item", ["parameters", "optimizer"])
def test_what_tells_of_an_items_arrays_is_noticed_too(workdir, item):
    at_3, at_2 = (workdir / "checkpoints" / str(step) / item for step in (3, 2))
    (at_3 / "manifest.ocdbt").write_bytes(b"")
    (at_2 / "_METADATA").write_text("{")
    assert newest(workdir) == 1
    shutil.rmtree(workdir / "checkpoints" / "1" / item)
    with (
        Checkpoints(str(workdir), KEEP_ALL) as checkpoints,
        pytest.raises(UserError, match=r"step 1 in .* is damaged"),
    ):
        checkpoints.restore_newest(abstract(), MESH())


def test_a_place_in_the_data_that_was_changed_is_noticed(workdir):
    path = next((workdir / "checkpoints" / "3" / "data").glob("*"))
    path.write_text(json.dumps(place_of(4)))
    assert newest(workdir) == 2


def test_sums_that_are_missing_are_damage_but_of_older_checkpoints(workdir):
    shutil.rmtree(workdir / "checkpoints" / "3" / "sums")
    shutil.rmtree(workdir / "checkpoints" / "2" / "sums")
    path = next((workdir / "checkpoints" / "2" / "data").glob("*"))
    path.write_text(json.dumps(place_of(2)["lanes"]))  # as it was before there were sums
    with Checkpoints(str(workdir), KEEP_ALL) as checkpoints:
        step, _, place = checkpoints.restore_newest(abstract(), MESH())
    assert (step, place) == (2, {"lanes": place_of(2)["lanes"]})


def test_a_full_disk_is_seen_before_anything_is_written(workdir, monkeypatch):
    with Checkpoints(str(workdir), CheckpointConfig(keep=1)) as checkpoints:
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(workdir)._replace(free=100)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(Unsaved, match=r"step 4 could not be saved: it has .* MB"):
                checkpoints.save(4, state_of(4), place_of(4))
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(5, state_of(5), place_of(5))
        checkpoints.wait()
        assert checkpoints.steps() == [5]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_save_that_fails_harms_no_other_and_the_next_one_goes_on(workdir, monkeypatch, when):
    class Full:
        """A manager whose disk is full."""

        def __init__(self, manager):
            self._manager = manager

        def __getattr__(self, name):
            return getattr(self._manager, name)

        def save(self, *args, **kwargs):
            if when == "at once":
                raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        def wait_until_finished(self):
            raise RuntimeError("No space left on device\nand more")

    with Checkpoints(str(workdir), CheckpointConfig(keep=1)) as checkpoints:
        checkpoints._manager = Full(checkpoints._manager)
        if when == "at once":
            with pytest.raises(Unsaved, match="step 4 could not be saved: RESOURCE_EXHAUSTED"):
                checkpoints.save(4, state_of(4), place_of(4))
            checkpoints.save(5, state_of(5), place_of(5))
        else:
            checkpoints.save(4, state_of(4), place_of(4))
            with pytest.raises(
                Unsaved, match=r"step 4 could not be saved: No space left on device$"
            ):
                checkpoints.save(5, state_of(5), place_of(5))
            assert checkpoints.begun == 5  # which was begun all the same
        checkpoints.wait()
        assert checkpoints.steps() == [5]
        assert checkpoints.restore(5, abstract(), MESH())[1] == place_of(5)


def test_leaving_does_not_pass_over_a_save_that_failed(tmp_path):
    def fails():
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(Unsaved, match="step 1"),
        Checkpoints(str(tmp_path), KEEP_ALL) as checkpoints,
    ):
        checkpoints.save(1, state_of(1), place_of(1))
        checkpoints.wait()
        checkpoints.begun = 1
        checkpoints._manager.wait_until_finished = fails


def test_what_is_no_number_is_not_saved(workdir):
    state = state_of(4)
    name = next(iter(state.parameters))
    state.parameters[name] = state.parameters[name] * np.float32(np.nan)
    with Checkpoints(str(workdir), CheckpointConfig(keep=1)) as checkpoints:
        with pytest.raises(Unsaved, match=f"not every number in it is finite: parameters.*{name}"):
            checkpoints.save(4, state, place_of(4))
        assert checkpoints.steps() == [1, 2, 3]


def test_each_process_reads_for_itself(workdir):
    """So that one that cannot leaves none waiting in a barrier."""
    options = storage.reader(str(workdir / "checkpoints"))._multiprocessing_options
    assert options.active_processes == {jax.process_index()}


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("UNAVAILABLE: 503 Service Unavailable"), Interrupted, "cannot be read now"),
        (PermissionError(13, "Permission denied"), UserError, "may not be read"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), RuntimeError, "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_cannot_be_read_now_is_not_damaged(workdir, monkeypatch, error, kind, said):
    def fails(*_):
        raise error

    with Checkpoints(str(workdir), KEEP_ALL) as checkpoints:
        monkeypatch.setattr(checkpoints, "_read", fails)
        with pytest.raises(kind, match=said):
            checkpoints.restore_newest(abstract(), MESH())
        assert checkpoints.steps() == [1, 2, 3]


def test_the_newest_up_to_a_step(workdir):
    damage(workdir, 2, "parameters/**/d/*")
    with Checkpoints(str(workdir), KEEP_ALL) as checkpoints:
        assert checkpoints.restore_newest(abstract(), MESH(), last=2)[0] == 1
        assert checkpoints.steps() == [1, 3]
        assert checkpoints.restore_newest(abstract(), MESH(), last=0) is None
