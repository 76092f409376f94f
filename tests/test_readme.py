"""Every command and every piece of code in README.md is run, word for word, in its order.

They run in a copy of the repository whose environment has an interpreter that makes them small: it
appends a tiny model and few steps to `lm_jax.train`, few tokens to `lm_jax.generate` and so on, and
does nothing for pip. All else is as a reader would have it.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import commands
import jax
import numpy as np
import pytest
from tiny_models import logits

from lm_jax.config import Config, MeshConfig
from lm_jax.config_keys import walk
from lm_jax.data.chat import chat_template_for
from lm_jax.generation.filling import encode_with_masks
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.inference import load_for_inference

README = (commands.ROOT / "README.md").read_text(encoding="utf-8")

_INTERPRETER = """#!/bin/sh
steps=2 more=
case "$*" in *training.steps=*) steps=4 ;; esac
case "$*" in *runs/quickstart*) ;; *) more='{less}' ;; esac
small='{tiny}'
case "$*" in *init_from=runs/published*) small='{rest}' ;; esac
case "$*" in *tokens:*) small=$(echo "$small" | sed s/--config.tokenizer.kind=bytes//) ;; esac
case "$*" in *answer.py*) small="$small --config.data.length=128" ;; esac  # for its instruction
case "$*" in *--replay=*) exec {python} -m lm_jax.train "$3" --replay=4 ;; esac
case "$1 $2" in
  "-m pip") echo "$*" >>pip.log ;;
  "-m ruff") exec {python} "$@" configs ;;
  "-m pytest") exec {python} "$@" tests/test_recipes.py -k not_guessed ;;
  "-m lm_jax.train") exec {python} "$@" --config.training.steps=$steps $small $more ;;
  "-m lm_jax.plan")
    exec {python} "$@" $small --config.training.accumulation=1 --config.model.attention=xla ;;
  "-m lm_jax.generate") exec {python} "$@" --max_tokens=4 ;;
  "-m lm_jax.evaluate")
    case "$*" in *--task=*) ;; *) set -- "$@" --max_batches=1 ;; esac
    exec {python} "$@" ;;
  "-m lm_jax.serve")  # until it is ready
    {python} "$@" --port=0 >serve.log & server=$!
    until grep serving serve.log; do kill -0 $server || exit 1; sleep 0.1; done
    kill $server; wait $server ;;
  "-m lm_jax.tokenize")
    case "$*" in *--tokenizer=*) ;; *) set -- "$@" --vocab_size=300 ;; esac
    exec {python} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""
_TINY = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 4,
    "model.mlp_width": 64,
    "tokenizer.kind": "bytes",
    "data.length": 32,
    "data.batch_size": 8,
    "optimizer.schedule": "constant",  # others depend on the number of steps: compiled for each
    "training.accumulation": 1,
    "training.evaluate_batches": 1,
    "training.sample_tokens": 4,
    "logging.every": 1,
}
# What only one of the runs has to show; compiling it takes most of a tiny run's time.
_LESS = {
    "training.evaluate_every": 0,
    "training.sample_tokens": 0,
    "logging.tensorboard": False,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A copy of the repository with that interpreter, and the text that README.md speaks of."""
    root = tmp_path_factory.mktemp("read me") / "lm_jax"
    ignored = shutil.ignore_patterns(".venv*", ".git", "runs", ".*_cache", "__pycache__", "*.egg-*")
    shutil.copytree(commands.ROOT, root, ignore=ignored)
    binaries = root / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (root / ".venv" / "pyvenv.cfg").touch()
    rest = {k: v for k, v in _TINY.items() if not k.startswith(("model.", "tokenizer."))}
    tiny, rest, less = (
        " ".join(f"--config.{key}={value}" for key, value in values.items())
        for values in (_TINY, rest, _LESS)
    )
    script = _INTERPRETER.format(
        python=shlex.join(commands.python()), tiny=tiny, rest=rest, less=less
    )
    (binaries / "python").write_text(script)
    (binaries / "python").chmod(0o755)
    (binaries / "activate").write_text("PATH=$PWD/.venv/bin:$PATH\n")

    corpus = commands.write_corpus(root / "books")
    (root / "notes").mkdir()
    for file in corpus.iterdir():
        (root / "notes" / file.with_suffix(".md").name).write_text(file.read_text())
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    records = "".join(json.dumps({"content": text}) + "\n" for text in texts)
    (root / "records.jsonl").write_text(records)
    pairs = ",sent_more,sent_less,stereo_antistereo,bias_type\n0,a b,a c,stereo,age\n"
    (root / "crows_pairs_anonymized.csv").write_text(pairs)
    pair = {"en": "A dog runs.", "de": "Ein Hund rennt."}
    (root / "sentences.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    answer = {"text": "cat", "answer_start": 2}
    asked = {"id": "0", "question": "Who?", "answers": [answer]}
    paragraphs = [{"context": "A cat sat.", "qas": [asked]}] * 10
    (root / "questions.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    question = {"question": "France:", "choices": ["Paris", "Rome"], "answer": 0}
    (root / "capitals.jsonl").write_text(json.dumps(question) + "\n")
    (root / "input.txt").write_text("".join(texts))
    return root


@pytest.fixture(scope="module")
def done(checkout) -> str:
    """What the commands printed, all of them having succeeded."""
    env = commands.environment() | {
        "TFDS_DATA_DIR": str(checkout / "tfds"),
        "HF_HOME": str(checkout / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    env["CHROMIUM"] = sys.executable  # nothing is installed
    for variable in ("PYTHON", "VENV", "LM_JAX_EXTRAS"):
        env.pop(variable, None)
    for code in blocks("python"):
        if named := re.match(r"# (\S+\.py)\n", code):
            (checkout / named[1]).write_text(code)
        else:
            _run([sys.executable, "-c", code], checkout, env)
    for code in blocks("yaml"):
        file = checkout / re.match(r"# (\S+\.yaml)\n", code)[1]
        file.parent.mkdir()
        file.write_text(code)
    script = "\n".join(["set -eu", *blocks("sh")])
    return _run(["bash", "-c", script], checkout, env)


def _run(command: list[str], folder: pathlib.Path, env: dict[str, str]) -> str:
    ended = subprocess.run(
        command,
        cwd=folder,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def test_commands_and_code_run(done, checkout):
    assert len(blocks("sh")) > 8 and len(blocks("python")) == 3
    for workdir in re.findall(r"--workdir=(runs/\w+)", "".join(blocks("sh"))):
        assert (checkout / workdir / "checkpoints").is_dir(), workdir
    longer = (checkout / "runs" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, longer) if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4]
    assert "starts from the weights of runs/quickstart" in done
    assert '"step": 4, "from": 2, ' in done and '"same": true' in done
    assert "8 x cpu (data 2 x fsdp 2 x tensor 2)" in done
    assert len((checkout / "completions.jsonl").read_text().splitlines()) == 2
    assert json.loads((checkout / "pairs.jsonl").read_text())["bias"] == "age"
    assert '"by_category": {"age": {"score": ' in done
    assert '"results": {"capitals": {' in done and '"acc,none": ' in done
    assert done.count('"bits_per_byte"') == 4
    assert "plan for v5e:2x2: 4 devices" in done and "of 15.75: fits" in done
    assert "wrote a qwen3 model" in done and "without a tokenizer" not in done
    assert "starts from the weights of runs/published" in done
    for path in ("merged/model.safetensors", "adapters/adapter_model.safetensors"):
        assert (checkout / "runs" / path).is_file()
    assert np.load(checkout / "vectors.npy").shape == (2, 32)
    assert (checkout / "tfds" / "local_text" / "notes").is_dir()
    assert "1 passed" in done
    assert "serving 'published' at http://127.0.0.1:" in done
    for made in ("tpus tpu-vm create mine", "kind: JobSet", "sbatch --job-name=lm_jax"):
        assert made in done
    assert "--config.optimizer.warmup_steps=" in done  # --help


@pytest.fixture(scope="module")
def looks(done, checkout) -> dict[str, tuple[list[str], np.ndarray, np.ndarray]]:
    """Of each page that `inspect` made: the tokens as the page is to name them, their ids, and the
    log-probabilities [T, V] that the model gives at each place."""
    found = {}
    for page, run in (("quickstart", "quickstart"), ("bert", "bert"), ("chat", "answer")):
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        loaded = load_for_inference(str(checkout / "runs" / run), mesh)
        t = loaded.tokenizer
        if page == "quickstart":
            ids = t.encode_prompt("def main(args):")
        elif page == "bert":
            ids = encode_with_masks(t, "The [MASK] is open.")
        else:
            said = [{"role": "user", "content": "Who sat?"}]
            ids = chat_template_for(t, "chat").encode(t, said, add_generation_prompt=True)
            ids = np.concatenate([ids, t.encode(" A cat.")])
        with jax.set_mesh(mesh):
            log_p_TV = jax.nn.log_softmax(logits(loaded.model, ids[None])[0])
        names = [t.specials.get(i) or t.spelling(i).decode("latin-1") for i in map(int, ids)]
        found[page] = [name.replace("\n", "⏎") for name in names], ids, np.asarray(log_p_TV)
    return found


@pytest.mark.parametrize("page", ["quickstart", "chat"])
def test_pages_show_what_the_model_computed(looks, checkout, open_page, page):
    names, ids, log_p_TV = looks[page]
    shown = open_page((checkout / f"{page}.html").as_uri())
    assert shown.locator("#tokens button").all_text_contents() == [*names, "next"]
    if page == "chat":
        assert "".join(names).endswith("User: Who sat?⏎Assistant: A cat.")
    loss = -log_p_TV[np.arange(len(ids) - 1), ids[1:]]
    said = shown.inner_text("#summary")
    assert said.startswith(f"Mean loss {loss.mean():.3f} nats over {len(loss)} tokens")
    shown.locator("#tokens button").nth(5).click()
    assert f"{loss[4]:.3f} nats" in shown.inner_text("#chosen-facts")
    best = shown.locator("#candidates tbody tr").first.locator(".number").last.inner_text()
    assert abs(float(best.rstrip("%")) - 100 * np.exp(log_p_TV[4].max())) < 0.1
    shares = shown.locator("#most tbody tr td.number:nth-child(3)").all_text_contents()
    assert len(shares) == 6 and abs(sum(float(x.rstrip("%")) for x in shares) - 100) < 2
    last = shown.locator("#lens tbody tr").first.locator("td").nth(5).get_attribute("title")
    assert abs(float(last.split()[-1].rstrip("%")) - 100 * np.exp(log_p_TV[5].max())) < 0.1


def test_a_page_of_a_masked_model_shows_what_it_fills_in(looks, checkout, open_page):
    names, ids, log_p_TV = looks["bert"]
    shown = open_page((checkout / "bert.html").as_uri())
    assert shown.locator("#tokens button").all_text_contents() == names
    hidden = names.index("<mask>")
    assert shown.inner_text("#chosen") == f"Token {hidden + 1} of {len(ids)}: <mask>"
    chances = shown.locator("#candidates tbody tr td.number:nth-child(3)").all_text_contents()
    wanted = np.sort(100 * np.exp(log_p_TV[hidden]))[::-1][: len(chances)]
    assert len(chances) == 10
    np.testing.assert_allclose([float(x.rstrip("%")) for x in chances], wanted, atol=0.06)


def test_extras_that_it_installs_exist(done, checkout):
    project = tomllib.loads((commands.ROOT / "pyproject.toml").read_text())["project"]
    installed = re.findall(r"\[([\w,]+)\]", (checkout / "pip.log").read_text())
    assert installed == ["test", "test,cuda"]
    assert {"test", "cuda", "tpu"} <= set(project["optional-dependencies"])


def test_workdir_holds_what_it_says(done, checkout):
    listing = README.split("## What a workdir holds")[1].split("```")[1]
    named = [line.split()[0] for line in listing.strip().splitlines()]
    run = checkout / "runs" / "quickstart"
    for name in set(named) - {
        "checkpoints/STEP/",
        "profile/",
        "base.json",
        "best/",
        "predictions/",
        "starts.jsonl",
        "hang-0.txt",
        "damaged/STEP/",
    }:
        assert (run / name).exists(), name
    assert (checkout / "runs" / "adapted" / "base.json").exists()
    assert (checkout / "runs" / "translate" / "best" / "checkpoints").is_dir()
    assert (checkout / "runs" / "translate" / "predictions" / "2.report.json").exists()
    assert {entry.name for entry in run.iterdir()} <= {name.split("/")[0] for name in named}


def test_recipes_in_the_table_are_those_there_are():
    import test_recipes

    rows = dict(re.findall(r"^\| `(\w+)\.py` \| (.*?) \|", README, re.MULTILINE))
    assert set(rows) == {path.stem for path in (commands.ROOT / "configs").glob("*.py")}
    for recipe, cell in rows.items():
        there = {v for r, v in test_recipes.VARIANTS if r == recipe}
        if recipe == "finetune":
            there = set(test_recipes.module(recipe)._VARIANTS)
        named = set(re.findall(r"`(\S+?)`", cell))
        assert named <= there and (named == there or recipe == "gpt3")


def test_keys_and_files_that_it_names_exist():
    keys = [key for key, _, _ in walk(Config())]
    sections = "model|data|tokenizer|optimizer|training|mesh|checkpoint|logging"
    for key in re.findall(rf"`((?:{sections})\.(?!json)[\w.]+)", README):
        assert key in keys, key
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (commands.ROOT / path).exists(), path
    layout = README.split("## How the code is laid out")[1]
    for path in re.findall(r"`((?:data|model|training|sharding|interop)/\w+\.py)`", layout):
        assert (commands.ROOT / "lm_jax" / path).exists(), path
    for folder in re.findall(r"^  (\w+)/ ", layout, re.MULTILINE):
        assert os.path.isdir(commands.ROOT / "lm_jax" / folder), folder
