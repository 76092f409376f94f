"""`python -m lm_jax.plan` as users run it: real compilations for TPUs, and what does not fit."""

import json
import os
import shlex

import commands
import pytest

# Compiling takes libtpu longer by the width and length of what fits, and by nothing else.
TINY = {
    "model.vocab_size": 256,
    "model.layers": 2,
    "model.width": 128,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.mlp_width": 256,
    "model.max_length": 32,
    "model.attention": "xla",  # kernels take longer to compile
    "data.length": 32,
    "data.batch_size": 32,
    "mesh.fsdp": 4,
    "mesh.data": 1,
}


def plan(*more: str, **overrides):
    keys = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    return commands.run(
        "plan",
        "--config=configs/llama.py:smollm2_135m",
        "--topology=v5e:2x2",
        *(f"--config.{key}={value}" for key, value in keys.items()),
        *more,
    )


def test_what_does_not_fit_comes_with_what_does():
    large = {"model__width": 32, "model__mlp_width": 64, "model__layers": 16384}
    code, out, err = plan(**large)
    assert (code, err) == (1, "")
    assert "DOES NOT FIT: needs" in out and "this fits" in out
    flags = shlex.split(out.split("add:\n")[1].splitlines()[0])
    assert flags == ["--config.model.remat=full"]
    code, out, err = plan(*flags, **large)
    assert (code, err) == (0, "") and "of 15.75: fits" in out


def test_a_slice_as_json(monkeypatch):
    """Flags for CPUs, which libtpu does not know, are no hindrance."""
    for_cpus = commands.environment()["XLA_FLAGS"] + " --xla_cpu_use_fusion_emitters=true"
    monkeypatch.setattr(commands, "environment", lambda: os.environ | {"XLA_FLAGS": for_cpus})
    code, out, err = plan("--json")
    assert (code, err) == (0, "")
    got = json.loads(out)
    assert got["device_kind"] == "TPU v5 lite" and got["devices"] == 4 and got["fits"]
    assert got["mesh"]["fsdp"] == 4 and got["length"] == 32
    memory = got["memory_bytes"]
    assert memory["parameters"] == pytest.approx(4 * got["parameters"] / 4, rel=0.05)
    assert memory["total"] < got["hbm_bytes"]
    gathers = [c for c in got["collectives"] if c["kind"] == "all-gather"]
    assert gathers and all(c["axes"] == ["fsdp"] for c in gathers)
    assert got["estimate"]["computing"] > 0, "the compiler's own cycles were not found"
    low, high = got["estimate"]["mfu"]
    assert 0 < low <= high < 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "give --topology=v5e:4x4"),
        (("--topology=v5e:2x2", "--search", "--search_minutes=0"), "must be above 0, not 0"),
        (("--topology=v5q:2x2",), "no chip is called 'v5q'"),
        (("--topology=v5e:2x2", "--config.mesh.fsdp=3"), "does not fit 4 device"),
        (("--topology=v5e:2x2", "--config.tokenizer.kind=characters"), "--config.model.vocab_size"),
    ],
)
def test_mistakes_are_messages(flags, said):
    code, out, err = commands.run("plan", "--config=configs/llama.py", *flags)
    assert (code, out) == (1, "") and err.startswith("error: ") and said in err
    assert "Traceback" not in err
