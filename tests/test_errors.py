"""What a user gets wrong is told in one message, with what to do; nothing is overwritten."""

import hashlib
import pathlib
import re
import subprocess
import sys

import commands
import pytest
from commands import environment, tiny

from lm_jax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return commands.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def fails(*flags: object, devices: int = 1, command: str = "train") -> str:
    """The message of a command that must fail: exit code not 0, and no traceback."""
    code, out, err = commands.run(command, *map(str, flags), env=environment(devices))
    assert code != 0, out + err
    assert "Traceback" not in out + err
    assert err.count("error: ") == 1, err
    return err[err.index("error: ") :]


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_mistyped_key_names_the_nearest(corpus, tmp_path):
    message = fails(*tiny(corpus, optimizer__learing_rate=1), f"--workdir={tmp_path / 'run'}")
    assert "optimizer.learing_rate" in message
    assert "did you mean 'optimizer.learning_rate'" in message
    message = fails(*tiny(corpus, model__learning_rate=1), f"--workdir={tmp_path / 'run'}")
    assert "did you mean 'optimizer.learning_rate'" in message
    assert not (tmp_path / "run").exists()


def test_arguments_can_be_checked_without_a_run(corpus, tmp_path):
    flags = [*tiny(corpus), f"--workdir={tmp_path / 'run'}", "--validate_only"]
    assert commands.run("train", *flags, env=environment()) == (0, "", "")
    assert "model.kv_heads" in fails(*flags, "--config.model.kv_heads=3")
    assert not (tmp_path / "run").exists()


def test_a_mistyped_value_names_the_choices(corpus, tmp_path):
    message = fails(*tiny(corpus, optimizer__name="adam"), f"--workdir={tmp_path / 'run'}")
    assert "optimizer.name" in message and "adamw" in message and "muon" in message
    message = fails(*tiny(corpus, model__layers="three"), f"--workdir={tmp_path / 'run'}")
    assert "model.layers" in message and "'three' is no whole number" in message


def test_every_wrong_field_is_named_at_once(corpus, tmp_path):
    flags = tiny(corpus, model__kv_heads=3, data__lanes=5, training__accumulation=7)
    message = fails(*flags, f"--workdir={tmp_path / 'run'}")
    for key in ("model.kv_heads", "data.lanes", "training.accumulation"):
        assert key in message


def test_a_mistyped_flag_or_recipe_names_the_nearest(corpus, tmp_path):
    assert "did you mean '--workdir'" in fails(*tiny(corpus), f"--workdri={tmp_path / 'run'}")
    message = fails("--config=configs/quikstart.py", f"--workdir={tmp_path / 'run'}")
    assert "did you mean 'configs/quickstart.py'" in message
    message = fails("--config=configs/zzz.py", f"--workdir={tmp_path / 'run'}")
    assert "there are answer.py, bert.py" in message
    message = fails(*tiny(corpus), "--accumulation=3", f"--workdir={tmp_path / 'run'}")
    assert "did you mean '--config.training.accumulation'?" in message
    for flag, keys in (
        ("vocab_size", ["model.vocab_size", "tokenizer.vocab_size"]),
        ("experts", ["model.moe.experts"]),
        ("every", ["task.every", "checkpoint.every", "logging.every"]),
        ("moe.experts", ["model.moe.experts"]),
        ("learning_rat", ["optimizer.learning_rate"]),
    ):
        meant = " or ".join(f"'--config.{key}'" for key in keys)
        message = fails(*tiny(corpus), f"--{flag}=3", f"--workdir={tmp_path / 'run'}")
        assert f"did you mean {meant}?" in message, message
    assert "--workdir" in fails(*tiny(corpus))
    assert "--config" in fails(f"--workdir={tmp_path / 'run'}")


def test_a_missing_file_names_the_nearest(corpus, tmp_path):
    message = fails(*tiny(corpus / "031.tx"), f"--workdir={tmp_path / 'run'}")
    assert "031.tx'" in message and "031.txt" in message


def test_an_interrupt_among_the_imports_ends_a_command_in_one_line():
    code = (
        "import os, signal\n"
        "from lm_jax import cli\n"
        "before = signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, before)\n"  # in the background it may be ignored
        "with cli.importing(): pass\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "with cli.importing(): os.kill(os.getpid(), signal.SIGINT); print('too late')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_an_empty_corpus(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    message = fails(*tiny(empty), f"--workdir={tmp_path / 'run'}")
    assert "empty.txt" in message and "empty" in message
    (tmp_path / "folder").mkdir()
    assert "folder" in fails(*tiny(tmp_path / "folder"), f"--workdir={tmp_path / 'run'}")


def test_invalid_utf8_names_file_and_line(tmp_path):
    bad = commands.write_corpus(tmp_path / "corpus", documents=3)
    (bad / "001.txt").write_bytes(b"good\nstill good\nb\xffd\n")
    message = fails(*tiny(bad), f"--workdir={tmp_path / 'run'}")
    assert "001.txt:3" in message and "UTF-8" in message


def test_a_record_that_fails_on_the_way_loses_nothing(tmp_path):
    workdir, lines = tmp_path / "run", ['{"text": "a line of text that is good"}'] * 400
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join([*lines, '{"text": "cut off', *lines]) + "\n")
    # Few rows open at a time, so that the bad record is not among the first that are read.
    tiny_bins = {"data__shuffle": False, "data__packing_bins": 2, "data__lanes": 1}
    flags = tiny(source, **tiny_bins, checkpoint__every=0, training__steps=500)
    message = fails(*flags, f"--workdir={workdir}")
    assert "data.jsonl:401" in message and "data.on_error" in message
    with Checkpoints(str(workdir)) as checkpoints:
        assert checkpoints.latest() > 1
    # Goes on from there once it is told to skip such records.
    flags = tiny(source, **tiny_bins, data__on_error="skip", training__steps=40)
    code, _, err = commands.run("train", *flags, f"--workdir={workdir}")
    assert code == 0 and "goes on from step" in err, err


def test_a_batch_that_does_not_divide(corpus, tmp_path):
    flags = tiny(corpus, data__batch_size=12, training__accumulation=1)
    message = fails(*flags, f"--workdir={tmp_path / 'run'}", devices=8)
    assert "12" in message and "8 devices" in message and "data.batch_size" in message
    message = fails(*tiny(corpus, mesh__tensor=3), f"--workdir={tmp_path / 'run'}", devices=8)
    assert "mesh" in message and "8 device" in message


def test_a_model_that_the_mesh_does_not_divide(corpus, tmp_path):
    flags = tiny(corpus, mesh__tensor=8, mesh__data=1, model__heads=4)
    message = fails(*flags, f"--workdir={tmp_path / 'run'}", devices=8)
    assert "blocks.attention.query" in message and "mesh.tensor = 8" in message


def test_a_vocabulary_that_does_not_fit(corpus, tmp_path):
    flags = tiny(corpus, tokenizer__kind="sentencepiece", tokenizer__vocab_size=50_000)
    message = fails(*flags, f"--workdir={tmp_path / 'run'}")
    assert "tokenizer.vocab_size" in message and "50000" in message
    message = fails(*tiny(corpus, model__vocab_size=100), f"--workdir={tmp_path / 'run'}")
    assert "model.vocab_size = 100" in message and "258" in message


def test_a_workdir_of_another_config_is_left_as_it_is(corpus, tmp_path):
    workdir = tmp_path / "run"
    code, _, err = commands.run("train", *tiny(corpus, training__steps=2), f"--workdir={workdir}")
    assert code == 0, err
    before = contents(workdir)
    message = fails(*tiny(corpus, training__steps=4, model__width=64), f"--workdir={workdir}")
    assert "model.width: 32 -> 64" in message and "another --workdir" in message
    assert contents(workdir) == before
    # Its weights have a shape; a recipe is not asked for it, and a flag must not say another.
    flags = tiny(corpus, model__mlp_width=96, init_from=workdir)
    message = fails(*flags, f"--workdir={tmp_path / 'other'}")
    assert f"model.mlp_width: comes with the weights of {workdir} (64): leave it out" in message
    assert "no checkpoint of step 7" in fails(
        f"--workdir={workdir}", "--step=7", command="evaluate"
    )
    assert contents(workdir) == before


def test_what_failed_before_its_first_step_can_be_mended_in_the_same_workdir(corpus, tmp_path):
    workdir = tmp_path / "run"
    fails(*tiny(tmp_path / "missing"), f"--workdir={workdir}")
    code, _, err = commands.run("train", *tiny(corpus, training__steps=1), f"--workdir={workdir}")
    assert code == 0, err


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_workdir_without_a_run(tmp_path, command):
    message = fails(f"--workdir={tmp_path}", command=command)
    assert "neither the workdir of a run nor a Hugging Face folder" in message
    assert "--workdir" in fails(command=command)


def test_a_file_of_flags_that_cannot_be_read(tmp_path):
    (tmp_path / "image").write_bytes(b"\x89PNG\xff")
    for command in ("train", "generate"):
        for name, said in (("none", "': No such file"), ("image", "' is no text in UTF-8")):
            message = fails(f"--flagfile={tmp_path}/{name}", command=command)
            assert f"error: --flagfile: '{tmp_path}/{name}{said}" in message
    (tmp_path / "flags").write_text(f"{commands.RECIPE}\n--config.model.layer=2\n")
    assert "layer" in fails(f"--flagfile={tmp_path}/flags", f"--workdir={tmp_path}/run")


def test_a_run_that_diverges_is_stopped(corpus, tmp_path):
    flags = tiny(
        corpus,
        training__steps=60,
        optimizer__learning_rate=1e30,
        optimizer__clip_norm=0.0,
        optimizer__warmup_steps=0,
    )
    message = fails(*flags, f"--workdir={tmp_path / 'run'}")
    assert re.search("no number at 10 steps in a row, [0-9]+ to [0-9]+:", message)
    assert "optimizer.learning_rate" in message


def test_a_task_that_cannot_be_run(tmp_path):
    model, task = f"--model={tmp_path}", "--task=crows_pairs"
    for flags, said in (
        (["--task=lm_eval:"], "--task: name the harness's tasks"),
        (["--task=sumarize"], "no task 'sumarize'; did you mean 'summarize'? (there are translate"),
        (["--task=answer", "--length=5"], "--length: has no meaning for --task=answer"),
        ([task], "--source: crows_pairs needs one file"),
        ([task, "--source=a", "--max_batches=1"], "--max_batches: has no meaning"),
        (["--output=scores.jsonl"], "--output: has no meaning without --task"),
        (["--batch_size=0"], "batch_size"),
    ):
        assert said in fails(model, *flags, command="evaluate")
