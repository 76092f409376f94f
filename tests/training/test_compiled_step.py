"""What the compiler makes of a train step, on record: speed that needs no clock.

FLOPs of products and bytes of intermediate results are to be within 5% of what
tests/training/compiled_steps.json has. Of the bytes each minor version of jax, whose compilers
differ, has a record of its own; one that has none may need a quarter more than the last. If less or
more is meant, write it anew, with each version of jax:

    python tests/training/test_compiled_step.py --write
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from typing import Any

if __name__ == "__main__":  # as tests/conftest.py has it for pytest
    tests = pathlib.Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests.parent)]
    import quick_compiler

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count=8 {quick_compiler.FLAGS}".strip()
    )

import jax
import numpy as np
import pytest
import tiny_models
from tiny_models import on_devices, packed_batch, run_config

from lm_jax.planning.work import traced_work
from lm_jax.sharding.mesh import to_devices
from lm_jax.training.program import abstract_batch, abstract_state, jit_train_step
from lm_jax.training.step import make_step

VERSION = ".".join(jax.__version__.split(".")[:2])
RECORD = pathlib.Path(__file__).parent / "compiled_steps.json"
ROWS, LENGTH, VOCABULARY = 8, 96, 1024
SHAPE = {"vocab_size": VOCABULARY, "max_length": LENGTH, "width": 64, "head_width": 16}
KINDS = {
    "gpt2": (tiny_models.GPT2, {}),
    "gpt2, unrolled": (dataclasses.replace(tiny_models.GPT2, scan_layers=False), {}),
    "llama, remat": (dataclasses.replace(tiny_models.LLAMA, remat="dots"), {}),
    "llama, accumulation": (tiny_models.LLAMA, {"accumulation": 2}),
    "experts": (tiny_models.MOE, {}),
}
MESHES = {"one device": (1, 1, 1), "eight": (2, 2, 2)}
CASES = [(kind, "one device") for kind in KINDS]
CASES += [(kind, "eight") for kind in ("gpt2", "llama, remat", "experts")]


def config_of(kind: str):
    model, training = KINDS[kind]
    model = dataclasses.replace(model, **SHAPE)
    data = {"length": LENGTH, "batch_size": ROWS}
    return run_config(model, data=data, training={"loss_chunk": 48, **training})


@functools.cache
def compiled(kind: str, axes: tuple[int, ...]):
    config, mesh = config_of(kind), on_devices(axes)
    step = make_step(config)
    state, batch = abstract_state(step, mesh), abstract_batch(config.data, mesh)
    with jax.set_mesh(mesh):
        traced = jit_train_step(step, mesh).trace(state, batch)
        return traced_work(traced).total, traced.lower().compile(), state


def measured(kind: str, axes: tuple[int, ...]) -> dict[str, float]:
    work, program, _ = compiled(kind, axes)
    return {"flops": work, "temporaries": program.memory_analysis().temp_size_in_bytes}


def records() -> dict[str, dict[str, Any]]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_a_step_costs_what_is_on_record(kind, mesh):
    got, known = measured(kind, MESHES[mesh]), records()[f"{kind}; {mesh}"]
    assert got["flops"] == pytest.approx(known["flops"], rel=0.05)
    by_version = known["temporaries"]
    if VERSION in by_version:
        assert got["temporaries"] == pytest.approx(by_version[VERSION], rel=0.05)
    else:
        assert got["temporaries"] < 1.25 * list(by_version.values())[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_compiled_step(kind):
    """No logits of the whole batch, no way to the host, and the state in its old place."""
    _, program, state = compiled(kind, (1, 1, 1))
    text = program.as_text()
    whole = ROWS * LENGTH // config_of(kind).training.accumulation
    sizes = [f"[{whole},{VOCABULARY}]", f",{LENGTH},{VOCABULARY}]", f"[1,{whole},{VOCABULARY}]"]
    assert not [size for size in sizes if size in text]
    assert f"[48,{VOCABULARY}]" in text  # which is what they would look like
    for word in ("infeed", "outfeed", "send(", "recv(", "host_callback", "xla_python", "callback"):
        assert word not in text, word
    held = sum(x.dtype.itemsize * int(np.prod(x.shape)) for x in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes == held


def test_a_run_compiles_its_step_once_and_needs_nothing_from_the_host():
    config, mesh = run_config(), on_devices((2, 2, 2))
    with jax.set_mesh(mesh):
        step = make_step(config)
        update, state = jit_train_step(step, mesh), jax.jit(step.init)()
        for seed in range(3):
            batch = to_devices(packed_batch(seed=seed), mesh)
            with jax.transfer_guard("disallow"):
                state, _ = update(state, batch)
        assert update._cache_size() == 1
        refused = pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed")
        with refused, jax.transfer_guard("disallow"):  # the guard works
            update(state, packed_batch())


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    known = records()
    for kind, mesh in CASES:
        found, name = measured(kind, MESHES[mesh]), f"{kind}; {mesh}"
        others = known.get(name, {}).get("temporaries", {})
        found["temporaries"] = dict(sorted((others | {VERSION: found["temporaries"]}).items()))
        known[name] = found
    RECORD.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
