"""The benchmarks run, at a size that says nothing about speed or memory."""

import dataclasses
import json
import math
import pathlib
import shlex
import subprocess
import sys
import types

import commands
import published_folders
import pytest
import random_llama
import torch
import transformers as hf

from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.interop.tokenizer_export import write_huggingface_tokenizer

FOLDER = commands.ROOT / "tests" / "benchmarks"


def run(name: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    program = [sys.executable, FOLDER / f"{name}.py", *flags]
    return subprocess.run(program, env=commands.environment() | env, capture_output=True, text=True)


def test_pretrained_memory(tmp_path):
    flags = ["--parameters=1e6", "--shard_mb=1", "--devices=2"]
    done = run("pretrained_memory", *flags, TMPDIR=str(tmp_path))
    if not pathlib.Path("/proc/self/clear_refs").exists():  # not Linux
        assert done.returncode == 2 and "no /proc/self/clear_refs" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    result = json.loads(line)
    names = ["load bfloat16", "export float32", "export bfloat16"]
    assert [phase["phase"] for phase in result["phases"]] == names
    assert all(name in "\n".join(table) for name in names)
    assert 1e6 <= result["parameters"] < 3e6 and result["devices"] == 2
    # Norms, one number in a hundred here, are on both devices.
    assert 4 * result["parameters"] <= result["model"] < 4.1 * result["parameters"]
    for phase, width in zip(result["phases"], (2, 4, 2)):
        assert phase["tensors"] == 2 * width * 64 * 128**2  # the embedding and the head
        assert width * 64 * 128**2 <= phase["shard"] <= phase["tensors"]
        assert phase["seconds"] > 0 and phase["beyond"] < 200e6
        assert phase["ratio"] == pytest.approx(
            phase["beyond"] / max(1.5 * phase["shard"], phase["tensors"]), abs=1e-3
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chatting(tmp_path_factory) -> pathlib.Path:
    """The folder of a tiny published model that chats."""
    folder = tmp_path_factory.mktemp("published") / "chatting"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer:"
    files = {"chat_template.jinja": template}
    published_folders.write(folder, published_folders.FAMILIES["smollm2"]() | files)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=1000, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.5,
    ))  # fmt: skip
    model.save_pretrained(folder)
    return folder


def run_here(name: str, monkeypatch, *flags: object) -> tuple[types.ModuleType, int]:
    module = commands.loaded(f"tests/benchmarks/{name}.py")
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
    return module, module.main()


def test_applications_agree_or_it_fails(chatting, tmp_path, monkeypatch, capsys):
    source = tmp_path / "dialogues.jsonl"
    dialogues = [{"dialogue": f"A: {'hm ' * i}yes?", "summary": "ok"} for i in range(3)]
    source.write_text("".join(json.dumps(d) + "\n" for d in dialogues))
    flags = [f"--model={chatting}", "--task=summarize", f"--source={source}", "--max_tokens=5"]
    module, code = run_here("applications", monkeypatch, *flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and result["same_answers"] == result["examples"] == 3
    assert result["rougeL"] == result["rougeL_in_transformers"]
    monkeypatch.setattr(module, "reference", lambda *_: ["another"] * 3)
    assert module.main() == 1


def test_fairness_agrees_or_it_fails(chatting, tmp_path, monkeypatch, capsys):
    source = tmp_path / "pairs.csv"
    rows = ["Women drive badly.,Men drive badly.", "The old man forgot.,The young man forgot."]
    source.write_text(
        "sent_more,sent_less,stereo_antistereo,bias_type\n"
        + "".join(f"{row},stereo,age\n" for row in rows)
    )
    module, code = run_here("fairness", monkeypatch, f"--model={chatting}", f"--source={source}")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and result["same_preference"] == result["pairs"] == 2
    assert result["score"] == result["score_in_transformers"]
    monkeypatch.setattr(module, "reference", lambda *_, **__: lambda a, b: (-1.0, -2.0))
    assert module.main() == 1


def test_plans_are_shown_as_a_table_and_not_compiled_again(tmp_path):
    plans = commands.loaded("tests/benchmarks/plans.py")
    (model, *what), (_, *other) = [row for row in plans.ROWS if row[0] == "GPT-2 124M"]
    plan = {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 1},
        "batch_size": 480,
        "length": 1024,
        "accumulation": 5,
        "compile_seconds": 19.2,
        "fits": True,
        "hbm_bytes": 16 * 2**30,
        "memory_bytes": {"total": 8 * 2**30},
        "collectives": [{"a_step": 7, "asynchronous": 3}, {"a_step": 5, "asynchronous": 0}],
        "estimate": {
            "fast": 1.5,
            "slow": 2.0,
            "mfu": [0.24, 0.3],
            "computing": 1.25,
            "kernels": 0.5,
            "peak": 8.0,
            "model_flops": 4.0,
        },
    }
    commands_ = ["python " + shlex.join(plans.command(*row)) for row in (what, other)]
    lines = [
        json.dumps(plan | {"command": commands_[0]}),
        json.dumps(plan | {"command": commands_[1], "fits": False}),
    ]
    stored = tmp_path / "plans.jsonl"
    stored.write_text("\n".join(lines) + "\n")
    done = run("plans", f"--only={model}", f"--output={stored}")
    assert done.returncode == 0, done.stderr
    _, _, fits, not_ = done.stdout.splitlines()
    cells = [cell.strip() for cell in fits.strip("|").split("|")]
    assert cells == [
        "GPT-2 124M",
        what[1],
        "data 2, fsdp 2; 480 x 1024 in 5",
        "8.0 of 16.0",
        "3 of 12",
        "1.50 to 2.00",
        "24% to 30%",
        "40%",
        "19 s",
    ]
    assert "does not fit" in not_
    assert stored.read_text().splitlines() == lines


def test_serving(tmp_path):
    """The command itself: what it answers, what it refuses, and how it ends."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    model = random_llama.llama(width=64, layers=1, mlp_width=64, vocab_size=258)
    random_llama.write(folder, dataclasses.replace(model, max_length=512), "float32", 10**9)
    write_huggingface_tokenizer(BytesTokenizer(), folder)
    flags = ["--clients=6", "--seconds=0.3", "--tokens=8", "--requests=4", "--slots=4"]
    done = run("serving", f"--model={folder}", *flags, **commands.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["model"] == "tiny" and result["many"]["clients"] == 6
    assert result["same"] == result["answers"] >= 7
    assert result["requests_that_differ"] == [] and result["exit"] == 0
    assert all(result["refused"].values())
    assert "Traceback" not in done.stderr
    assert "stopping: running answers may end" in done.stderr


def result_of(name: str, *flags: str) -> dict:
    done = run(name, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_compares_models_of_one_size():
    # Compiling with PyTorch needs a C++ compiler.
    got = result_of("training", "--shape=toy", "--rounds=1", "--contenders=lm_jax,eager")
    assert got["lm_jax"]["parameters"] == got["eager"]["parameters"] > 0
    for name in ("lm_jax", "eager"):
        assert got[name]["loss"] == pytest.approx(math.log(64), rel=0.1)  # nothing is known yet
    ratio = got["eager"]["milliseconds"] / got["lm_jax"]["milliseconds"]
    assert got["times_eager"] == pytest.approx(ratio, abs=1e-3)


def test_decoding_compares_the_same_tokens():
    got = result_of("decoding", "--shape=toy", "--rows=2", "--tokens=8", "--rounds=1")
    assert got["same"] == 1.0 and got["times"] > 0 and got["share"] > 0


def test_products_are_all_of_a_step():
    got = result_of("products", "--shape=toy", "--times=1", "--rounds=1")
    attention, mlp, head = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 128, 32 * 64
    flops = 6 * 2 * 16 * (2 * (attention + mlp) + head)
    assert got["gflop"] == pytest.approx(flops / 1e9, abs=1e-6)
    assert min(got["xla"], got["torch"]) > 0


def test_feeding(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"One fish, two fish, red fish, fish {n}.\n" for n in range(200)))
    flags = [f"--text={text}", f"--folder={tmp_path / 'corpora'}", "--megabytes=0.1"]
    flags += ["--tokenizers=bpe", "--vocab_size=300", "--shape=toy", "--rounds=1", "--batches=4"]
    if not pathlib.Path("/proc/self/clear_refs").exists():  # not Linux
        assert "no /proc/self/clear_refs" in run("feeding", *flags).stderr
        return
    got = result_of("feeding", *flags)
    assert got["bpe"]["share"] > 0 and min(got["bpe"]["memory"]) > 10e6
    assert got["bpe"]["same_after_a_kill"] is True
    assert got["feeding"]["times_text"] > 0 and got["feeding"]["times_tokens"] > 0
    assert list(tmp_path.iterdir()) == [text]


def test_starting(tmp_path):
    tiny = commands.tiny(commands.write_corpus(tmp_path / "corpus"))
    got = result_of("starting", "--rounds=1", "--commands=tokenize", *tiny)
    assert got["import lm_jax"] > 0 and got["tokenize --help"] > 0
    first, second = got["first"], got["second"]
    parts = ("imports", "tokenizer", "init", "sample", "data", "first step", "other")
    for each in (first, second):
        assert each["total"] == pytest.approx(sum(each.get(part, 0.0) for part in parts), abs=0.1)
        assert 0 < each["tracing"] < each["total"] and 0 < each["compiling"] < each["total"]
    assert second["compiling"] < first["compiling"]  # it was read


def test_saving(tmp_path):
    flags = [f"--folder={tmp_path / 'runs'}", "--layers=1", "--width=64", "--vocab_size=256"]
    if not pathlib.Path("/proc/self/clear_refs").exists():  # not Linux
        assert "no /proc/self/clear_refs" in run("saving", *flags).stderr
        return
    got = result_of("saving", *flags, "--rounds=1")
    assert got["bytes"] > 12 * 256 * 64  # a parameter and its two moments, of 4 bytes each
    assert all(got[name] > 0 for name in ("save", "restore", "dd write", "dd read", "stall"))
    assert not list(tmp_path.iterdir())


def test_growth_compares_each_size_with_the_first():
    rows = result_of("growth", "--toy", "--steps=1")
    sizes = {"layers": [1], "devices": [1, 2], "layers, unrolled": [1]}
    for name, wanted in sizes.items():
        found = [row for row in rows if row["what"] == name]
        assert [row["size"] for row in found] == wanted and found[0]["times"] == 1
        assert all(row["compile_s"] > 0 for row in found)
        for row in found:
            times = row["step_ms"] / found[0]["step_ms"]
            assert row["times"] == pytest.approx(times, abs=0.01)


def test_learning_tells_what_a_change_is_worth(tmp_path):
    text = tmp_path / "input.txt"
    text.write_text("".join(f"{n} is followed by {n + 1}.\n" for n in range(300)))
    toy = ["model.width=32", "model.layers=1", "data.length=32", "model.max_length=32"]
    flags = [f"--text={text}", "--steps=4", "--every=2", "--only", "1", "3", "--set", *toy]
    plain, better = result_of("learning", *flags)
    assert plain["changed"] == "nanoGPT's recipe" and better["changed"] == "this recipe"
    for row in (plain, better):
        assert row["steps"] == 4 and 1 < row["loss"] < 4 and row["reached"] is None
    assert better["loss"] < plain["loss"]
    chosen = ["--table=dtypes", *flags[:3], "--only", "0", "2", "--set", *toy]
    whole, rounded = result_of("learning", *chosen)
    assert rounded["loss"] == pytest.approx(whole["loss"], rel=0.05)
    assert rounded["loss"] != whole["loss"]
