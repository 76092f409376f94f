"""A masked language model as a user trains, watches and measures it."""

import json

import commands
import pytest
from commands import MASKED, environment, tiny


def test_a_masked_run_learns_shows_it_and_is_measured_again(tmp_path):
    corpus, workdir = commands.write_corpus(tmp_path / "corpus"), tmp_path / "run"
    env = environment()
    flags = tiny(
        corpus,
        training__steps=60,
        training__evaluate_every=30,
        training__sample_prompt="the model reads",
        training__sample_tokens=3,
        **MASKED,
    )
    code, _, err = commands.run("train", *flags, f"--workdir={workdir}", env=env)
    assert code == 0, err
    assert "of the masked tokens right" in err and f"lm_jax.evaluate --workdir={workdir}" in err
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    first, last = (x for x in lines if x["kind"] == "validation")
    assert last["loss"] < 0.9 * first["loss"] and 0 < last["accuracy"] < 1
    assert "bits_per_byte" not in last
    start, end = (workdir / "samples.txt").read_text().split("=== step 60 ===\n")
    for sample in (start.removeprefix("=== step 0 ===\n"), end):
        text, guesses = sample.rstrip("\n").rsplit("\n", 1)
        assert text and guesses.count(" for ") == 3, sample

    as_in_the_run = ["--max_batches=8"]  # the same rows in the same order, or others are masked
    code, out, err = commands.run("evaluate", f"--workdir={workdir}", *as_in_the_run, env=env)
    assert code == 0, err
    result = json.loads(out)
    for key in ("loss", "perplexity", "accuracy", "tokens", "bytes"):
        assert result[key] == pytest.approx(last[key], rel=1e-5)

    code, _, err = commands.run("generate", f"--workdir={workdir}", "--prompt=a", env=env)
    assert code == 1 and err.startswith("error: model.causal = False"), err
    code, _, err = commands.run("evaluate", f"--workdir={workdir}", "--length=2", env=env)
    assert code == 1 and "--length: masked rows have 3 tokens or more" in err, err
