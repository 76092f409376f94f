"""Whole runs, as a user starts, kills, resumes and uses them."""

import json
import os
import pathlib
import re
import shutil
import signal
import time

import commands
import pytest
from commands import environment, kill_after, losses, tiny, train

from lm_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return commands.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> tuple[pathlib.Path, str]:
    """The workdir of a run of 20 steps, and what it said."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    flags = tiny(
        corpus,
        training__steps=20,
        training__evaluate_every=10,
        training__sample_tokens=5,
        logging__tensorboard=True,
    )
    code, _, err = commands.run("train", *flags, f"--workdir={workdir}", env=environment())
    assert code == 0, err
    return workdir, err


def test_a_killed_run_resumes_bit_for_bit(tmp_path, corpus):
    """With masks, rows and parameters that are spread over a mesh. Runs of adapters, on one device,
    and of several processes, both of which predict the next token, have tests of their own."""
    env = environment(8)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "model__vocab_size": 260}
    flags = tiny(corpus, training__steps=commands.STEPS, **commands.MASKED, **mesh)
    train(*flags, f"--workdir={whole}", env=env)
    kill_after(10, killed, [*flags, f"--workdir={killed}"], env)
    train(*flags, f"--workdir={killed}", env=env)
    commands.assert_same_run(whole, killed)


def test_a_signal_saves_and_stops_and_a_workdir_is_trained_by_one_command_at_a_time(
    tmp_path, corpus
):
    workdir, env, seen = tmp_path / "run", environment(), 0
    flags = [
        *tiny(corpus, training__steps=100_000, checkpoint__every=0),
        f"--workdir={workdir}",
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        process = commands.start("train", *flags, env=env)
        while not (workdir / "metrics.jsonl").exists() or len(losses(workdir)) < seen + 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        if number == signal.SIGTERM:
            code, _, err = commands.run("train", *flags, env=env)
            assert code == 1 and "is being trained by process" in err, err
            os.kill(int(re.search(r"by process (\d+)", err)[1]), number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "Traceback" not in err
        with Checkpoints(str(workdir)) as checkpoints:
            assert checkpoints.latest() == max(losses(workdir)) > seen
            seen = checkpoints.latest()
    code, _, err = commands.run("train", *flags[:-1], f"--workdir={corpus}", env=env)
    assert code == 1 and "holds other files ('000.txt')" in err, err


def test_a_run_from_text_to_generated_and_evaluated(run, corpus, tmp_path):
    (finished, err), env, workdir = run, environment(), tmp_path / "run"
    assert "step 20/20 | loss" in err and "tokens/s" in err and "left" in err
    assert "--- sample at step 0 ---" in err and "--- sample at step 20 ---" in err
    times = map(json.loads, (finished / "time.jsonl").read_text().splitlines())
    assert all(r["seconds"]["sample"] > 0 for r in times if r["step"])  # from the first on
    assert re.search(rf"generate from it: .*python\S* -m lm_jax.generate --workdir={finished}", err)
    assert list((finished / "tensorboard").iterdir())
    shutil.copytree(finished, workdir)
    records = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    validations = [r for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in validations] == [10, 20]
    assert validations[1]["loss"] < validations[0]["loss"]
    train_record = next(r for r in records if r["kind"] == "train" and r["step"] == 5)
    assert {"gradient_norm", "learning_rate", "tokens_per_second", "model_flops_per_second"} <= (
        train_record.keys()
    )

    code, out, err = commands.run("evaluate", f"--workdir={workdir}", env=env)
    assert code == 0, err
    result = json.loads(out)
    for key in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes"):
        assert result[key] == pytest.approx(validations[1][key], rel=1e-5)

    prompt = ["--prompt=the model", "--max_tokens=8", "--seed=3"]
    first = commands.run("generate", f"--workdir={workdir}", *prompt, env=env)
    again = commands.run("generate", f"--workdir={workdir}", *prompt, env=env)
    assert first[0] == 0, first[2]
    assert first[1].startswith("the model") and len(first[1]) > len("the model")
    assert first[1] == again[1]

    other = tmp_path / "other"
    flags = tiny(corpus, training__steps=1, init_from=workdir, model__dropout=0.0)
    code, _, err = commands.run("train", *flags, f"--workdir={other}", env=env)
    assert code == 0, err
    assert f"starts from the weights of {workdir}, step 20" in err
    assert losses(other)[1] < losses(workdir)[1] - 0.5

    # The same command with more steps goes on; with fewer there is nothing left to do.
    flags = tiny(corpus, training__steps=22, training__evaluate_every=10)
    code, _, err = commands.run("train", *flags, f"--workdir={workdir}", env=env)
    assert code == 0, err
    assert f"goes on from step 20 of {workdir}" in err and max(losses(workdir)) == 22
    flags = tiny(corpus, training__steps=10)
    code, _, err = commands.run("train", *flags, f"--workdir={workdir}", env=env)
    assert code == 0 and "nothing left to train" in err, err


def test_a_finite_number_of_epochs_ends_the_run(tmp_path, corpus):
    workdir = tmp_path / "run"
    flags = tiny(corpus, training__steps=10_000, data__epochs=1, checkpoint__every=0)
    code, _, err = commands.run("train", *flags, f"--workdir={workdir}", env=environment())
    assert code == 0, err
    steps = max(losses(workdir))
    assert f"the data ended after {steps} steps" in err
    with Checkpoints(str(workdir)) as checkpoints:
        assert checkpoints.latest() == steps


def test_a_trace_that_a_stop_cut_off_does_not_stand_in_the_way(tmp_path, corpus):
    workdir, env = tmp_path / "run", environment()
    for steps in (4, 7):  # the second starts between the first and the last step of the trace
        flags = tiny(corpus, training__steps=steps, logging__profile_steps="4,5")
        train(*flags, f"--workdir={workdir}", env=env)
        assert list((workdir / "profile").rglob("*.xplane.pb"))
        shutil.rmtree(workdir / "profile")
    assert max(losses(workdir)) == 7


def test_a_damaged_checkpoint_is_said_to_be(tmp_path, run):
    workdir, env = shutil.copytree(run[0], tmp_path / "run"), environment()
    for path in (workdir / "checkpoints" / "20" / "parameters").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.unlink()
    code, _, err = commands.run("generate", f"--workdir={workdir}", env=env)
    # A thread of tensorstore may complain by itself, before the message or after it.
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and said.startswith("error: the checkpoint of step 20 in"), err
    assert "is damaged" in said
