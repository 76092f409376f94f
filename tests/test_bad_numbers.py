"""Runs whose numbers go wrong: what is left out, what they go back to, and what they say of it."""

import contextlib
import json
import math
import pathlib
import shutil
import types

import commands
import jax
import numpy as np
import pytest

from lm_jax.errors import UserError
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training import loop
from lm_jax.training import replay as replay_module
from lm_jax.training.replay import replay
from lm_jax.validation import validate


def config_of(corpus, **changes):
    """As `commands.tiny`, for a run in this process. Keyword a__b is the key a.b."""
    config = commands.loaded("configs/quickstart.py").get_config()
    changes = {"data__sources": (str(corpus),), "training__steps": 60} | changes
    changes = {"checkpoint__keep": 9, "optimizer__learning_rate": 0.01} | changes
    flags = [flag.removeprefix("--config.") for flag in commands.tiny(corpus)[1:]]
    for key, value in [flag.split("=", 1) for flag in flags]:
        changes.setdefault(key.replace(".", "__"), value)
    for key, value in changes.items():
        section, name = key.split("__")
        before = getattr(getattr(config, section), name)
        kind = type(before) if isinstance(value, str) and not isinstance(before, str) else None
        if kind is bool:
            value = value == "True"
        elif kind in (int, float):
            value = kind(value)
        setattr(getattr(config, section), name, value)
    return validate(config)


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """What happens to a run does not depend on how many there are; how long it takes does."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, replay_module):
            patch.setattr(module, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:2]))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return commands.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def seen(monkeypatch):
    """What training batches became on their way to the devices: `seen.wrong` maps the inputs of a
    batch to what is done to it, and `seen.order` has the inputs of all."""

    found, original = types.SimpleNamespace(order=[], wrong={}), loop.to_devices

    def to_devices(batch, mesh):
        key = batch["inputs"].tobytes()
        found.order.append(key)
        return original(found.wrong.get(key, lambda b: b)(batch), mesh)

    monkeypatch.setattr(loop, "to_devices", to_devices)
    return found


def no_number(batch):
    return batch | {"weights": batch["weights"] * np.float32(np.nan)}


def noise(batch):
    return batch | {"targets": (batch["targets"] * 7 + 101) % 256}


def train(config, workdir):
    with jax.transfer_guard("allow"):
        assert loop.train(config, str(workdir)) == 0
    return records(workdir)


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps_of(kind, found):
    return [r["step"] for r in found if r["kind"] == kind]


@pytest.fixture(scope="module")
def batches(corpus, tmp_path_factory):
    """The inputs of an undisturbed run's batches."""
    with pytest.MonkeyPatch.context() as patch:
        order, original = [], loop.to_devices
        patch.setattr(
            loop,
            "to_devices",
            lambda batch, mesh: (order.append(batch["inputs"].tobytes()), original(batch, mesh))[1],
        )
        train(config_of(corpus), tmp_path_factory.mktemp("clean") / "run")
    assert len(set(order)) == 60
    return order


def test_a_step_without_a_loss_is_left_out_and_told(corpus, tmp_path, batches, seen, capfd):
    seen.wrong = {batches[i - 1]: no_number for i in (7, 8, 20, 60)}
    found = train(config_of(corpus), tmp_path / "run")
    assert steps_of("skipped", found) == [7, 8, 20, 60]
    assert steps_of("train", found) == [i for i in range(1, 61) if i not in (7, 8, 20, 60)]
    assert all(math.isfinite(r["loss"]) for r in found if r["kind"] == "train")
    assert found[-2]["loss"] < found[0]["loss"] - 0.5  # it has learned
    assert "warning: the loss is nan at step 8: the step is left out" in capfd.readouterr().err
    assert not (tmp_path / "run" / "faults").exists()


def test_too_many_in_a_row_end_the_run_with_what_they_were_given(
    corpus, tmp_path, batches, seen, capfd
):
    seen.wrong = dict.fromkeys(batches[24:34], no_number)
    config = config_of(corpus, faults__skips=4)
    with pytest.raises(UserError, match="no number at 4 steps in a row, 25 to 28") as e:
        train(config, tmp_path / "run")
    assert "step 29 is saved" in str(e.value)
    (path,) = (tmp_path / "run" / "faults").iterdir()
    assert str(path) in str(e.value)
    told = json.loads(path.read_text())
    assert [(x["step"], x["loss"]) for x in told] == [(i, "nan") for i in range(25, 29)]
    inputs = np.frombuffer(batches[24], np.int32).reshape(16, -1)
    for row, ids in zip(told[0]["rows"], inputs, strict=True):
        assert row["ids"] == ids[: len(row["ids"])].tolist() and len(row["ids"]) > 20
        assert row["text"]
    # Nothing of it is in the model, and the run goes on where it stood once the cause is gone.
    seen.wrong = {}
    found = train(config, tmp_path / "run")
    assert steps_of("train", found)[-31:] == list(range(30, 61))
    assert found[-1]["loss"] < found[0]["loss"] - 0.5


SPIKE = {"faults__spike": 8.0, "faults__spike_window": 16}


def test_a_spike_takes_the_run_back_and_past_the_text(corpus, tmp_path, batches, seen, capfd):
    seen.wrong = {batches[i]: noise for i in (34, 35)}
    config = config_of(corpus, **SPIKE)
    found = train(config, tmp_path / "run")
    assert [(r["step"], r["to"]) for r in found if r["kind"] == "rewound"] == [(35, 20)]
    # What was undone stays to be looked at, before the line that says so.
    at = [r["kind"] for r in found].index("rewound")
    assert steps_of("train", found[:at]) == list(range(1, 35))
    assert steps_of("train", found[at:]) == list(range(21, 61))
    undone = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(p.name) for p in undone] == [10, 20, 30, 40, 50, 60]
    # Step 35 was found out while step 36 ran: step 21 is now of the batch behind that.
    assert seen.order[:36] == batches[:36] and seen.order[36:60] == batches[36:]
    assert len(seen.order) == 36 + 40
    err = capfd.readouterr().err
    assert "at step 35 is far above those before: the run goes back to step 20" in err
    # Wherever it is stopped, before the spike or after it, the same comes out.
    want = commands.stored_arrays(tmp_path / "run", 60)
    for stop in (33, 36):
        workdir = tmp_path / f"stopped at {stop}"
        for steps in (stop, 60):
            train(config_of(corpus, **SPIKE, training__steps=steps), workdir)
        got = commands.stored_arrays(workdir, 60)
        assert got.keys() == want.keys()
        for name, x in want.items():
            np.testing.assert_array_equal(got[name], x, err_msg=f"{stop} {name}")


def test_a_run_goes_back_only_so_often_and_only_to_what_is_saved(
    corpus, tmp_path, batches, seen, capfd
):
    seen.wrong = dict.fromkeys((batches[34], batches[58]), noise)
    with pytest.raises(UserError, match="has gone back 1 times, as often as faults"):
        train(config_of(corpus, **SPIKE, faults__rewinds=1), tmp_path / "run")
    # The state behind the spike is not saved, in whose favour good ones would be removed.
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())[-1] == 40
    found = train(config_of(corpus, **SPIKE, checkpoint__every=0), tmp_path / "unsaved")
    assert steps_of("rewound", found) == []
    assert "there is no checkpoint to go back to" in capfd.readouterr().err


def test_adapters_go_back_too(corpus, tmp_path, batches, seen):
    train(config_of(corpus), tmp_path / "base")
    config = config_of(corpus, **SPIKE)
    config.model.lora.rank, config.init_from = 2, str(tmp_path / "base")
    seen.order.clear()
    train(config, tmp_path / "clean")
    seen.wrong = {seen.order[34]: noise}
    found = train(config, tmp_path / "run")
    assert [(r["step"], r["to"]) for r in found if r["kind"] == "rewound"] == [(35, 20)]


def test_the_line_of_a_rewind_outlives_a_restart(corpus, tmp_path, batches, seen):
    seen.wrong = {batches[34]: noise}
    for steps in (36, 40):
        found = train(config_of(corpus, **SPIKE, training__steps=steps), tmp_path / "run")
        if steps == 36:  # killed on its way from 30 to 36
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "36")
    assert [(r["step"], r["to"]) for r in found if r["kind"] == "rewound"] == [(35, 20)]
    assert replay(str(tmp_path / "run"), 25)["note"].startswith("the run went back to step 20")


def test_a_step_is_replayed_bit_for_bit(corpus, tmp_path, batches):
    workdir = tmp_path / "run"
    found = {r["step"]: r for r in train(config_of(corpus), workdir)}
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    for step, start in ((17, 10), (20, 10), (5, 0)):
        got = replay(str(workdir), step)
        assert (got["from"], got["same"]) == (start, True)
        assert np.float32(got["loss"]) == np.float32(found[step]["loss"])
        told = json.loads(pathlib.Path(got["batch"]).read_text())[0]
        ids = np.frombuffer(batches[step - 1], np.int32).reshape(16, -1)
        assert [row["ids"] for row in told["rows"]] == [
            x[: len(row["ids"])].tolist() for row, x in zip(told["rows"], ids)
        ]
    assert {p: p.read_bytes() for p in before} == before
    for step in (0, 61):
        with pytest.raises(UserError, match="the run has steps 1 to 60"):
            replay(str(workdir), step)
    with contextlib.suppress(OSError):
        (workdir / "metrics.jsonl").unlink()
    assert replay(str(workdir), 5)["same"] is None
