"""Runs the package's commands as a user does, on a corpus and a model that are tiny."""

import functools
import importlib.util
import json
import os
import pathlib
import random
import subprocess
import time
import types
from typing import IO

import jax
import numpy as np
import quick_compiler
import warm_python

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = "--config=configs/quickstart.py"


def environment(devices: int = 1) -> dict[str, str]:
    """What a command runs under."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick_compiler.FLAGS}",
    }


@functools.cache
def python() -> list[str]:
    """The words that start an interpreter; `-m lm_jax.COMMAND` after them starts soonest."""
    return warm_python.started()


def start(
    command: str,
    *args: str,
    env: dict[str, str] | None = None,
    output: IO | int = subprocess.PIPE,
) -> subprocess.Popen:
    """`python -m lm_jax.COMMAND ARGS` from the repository's root, with its output as text.

    Args:
      output: a file for all of it; of a command that runs long, somebody would have to empty pipes.
    """
    return subprocess.Popen(
        [*python(), "-m", f"lm_jax.{command}", *args],
        cwd=ROOT,
        env=env or environment(),
        stdout=output,
        stderr=output,
        text=True,
    )


def loaded(path: str) -> types.ModuleType:
    """A recipe or script, by its path from the repository's root."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: str, *args: str, env: dict[str, str] | None = None):
    """As `start`, to its end: (exit code, stdout, stderr)."""
    process = start(command, *args, env=env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def losses(workdir: pathlib.Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if r["kind"] == "train"}


def stored_arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by path, parameters and optimizer state."""
    import orbax.checkpoint as ocp

    from lm_jax.training.checkpoint import Checkpoints

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever it was saved from
    with Checkpoints(str(workdir)) as checkpoints:
        manager, step = checkpoints._manager, checkpoints.choose(step)
        items = {
            name: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), found.tree
            )
            for name, found in manager.item_metadata(step).items()
            if name in ("parameters", "optimizer")
        }
        how = ocp.checkpoint_utils.construct_restore_args
        wanted = {
            name: ocp.args.PyTreeRestore(tree, restore_args=how(tree))
            for name, tree in items.items()
        }
        got = manager.restore(step, args=ocp.args.Composite(**wanted))
    leaves, _ = jax.tree.flatten_with_path({k: got[k] for k in ("parameters", "optimizer")})
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def train(*flags: str, env: dict[str, str]) -> None:
    code, out, err = run("train", *flags, env=env)
    assert code == 0, out + err


# So many that a run still has far to go when it is killed after the tenth.
STEPS = 40


def assert_same_run(whole: pathlib.Path, killed: pathlib.Path) -> None:
    """Two runs of STEPS steps ended with the same bits, and lost the same on their way."""
    expected, found = stored_arrays(whole, STEPS), stored_arrays(killed, STEPS)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name, strict=True)
    assert losses(whole) == losses(killed)
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))


def kill_after(step: int, workdir: pathlib.Path, flags: list[str], env: dict[str, str]) -> None:
    """Starts a run and kills it with SIGKILL when `step` is saved and a later one logged."""
    process = start("train", *flags, env=env)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            saved = (workdir / "checkpoints" / str(step)).is_dir()
            if saved and max(losses(workdir), default=0) > step:
                break
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    finally:
        process.kill()
        process.communicate()
    assert step < max(losses(workdir)) < STEPS, "the run was to be killed on its way"


# Keywords for `tiny`: a masked language model.
MASKED = {
    "data__objective": "masked",
    "data__mask_whole_words": True,
    "model__causal": False,
    "model__head": "masked_lm",
}


def write_corpus(folder: pathlib.Path, documents: int = 40) -> pathlib.Path:
    """Small text files of words in a random order, the same each time."""
    rng = random.Random(0)
    words = ("the", "model", "reads", "a", "token", "and", "writes", "one", "more", "ends")
    folder.mkdir()
    for i in range(documents):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 120)))
        (folder / f"{i:03}.txt").write_text(text + "\n")
    return folder


def tiny(corpus: pathlib.Path, **overrides: object) -> list[str]:
    """Flags of a run that takes a second or two once it is compiled, for any number of steps.

    Packing, shuffling, accumulation and dropout are on. Keyword a__b overrides the key a.b.
    """
    flags = {
        "data.sources": corpus,
        "data.length": 32,
        "data.batch_size": 16,
        "data.validation_fraction": 0.1,
        "tokenizer.kind": "bytes",
        "model.layers": 2,
        "model.width": 32,
        "model.heads": 4,
        "model.mlp_width": 64,
        "model.max_length": 64,
        "model.dropout": 0.1,
        "optimizer.name": "adamw",
        "optimizer.schedule": "constant",  # others depend on the number of steps
        "training.accumulation": 2,
        "training.evaluate_every": 0,
        "training.sample_tokens": 0,
        "checkpoint.every": 10,
        "logging.every": 1,
        "logging.tensorboard": False,
    }
    flags |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [RECIPE, *(f"--config.{key}={value}" for key, value in flags.items())]
