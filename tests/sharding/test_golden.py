"""Where each family's parameters and their optimizer moments lie on several meshes is on record.

A change of the rules or of a model shows as the lines of tests/sharding/golden/ that it changes. If
the change is meant, write them anew, and look at the difference before it is committed:

    python tests/sharding/test_golden.py --write
"""

import difflib
import os
import pathlib
import sys

if __name__ == "__main__":  # as tests/conftest.py has it for pytest
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    tests = pathlib.Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests.parent)]

import jax
import pytest
import tiny_models
from jax.sharding import PartitionSpec as P

from lm_jax.config import MeshConfig
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.step import TrainState, make_step

FAMILIES = {
    "gpt2": tiny_models.GPT2,
    "llama": tiny_models.LLAMA,  # fewer heads of keys and values than of queries
    "gemma": tiny_models.GEMMA,
    "bert": tiny_models.BERT,
    "experts": tiny_models.MOE,
    "lora": tiny_models.LORA,  # what is frozen has no moments
}
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp 2, sequence 2, tensor 2": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "fsdp 2, expert 2, tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
GOLDEN = pathlib.Path(__file__).parent / "golden"
WRITE = "python tests/sharding/test_golden.py --write"


def spec(x: jax.Array) -> str:
    """The mesh axes that split each axis of `x`; '-' where none does."""
    axes = tuple(P() if x.sharding is None else x.sharding.spec)
    axes += (None,) * (x.ndim - len(axes))
    return ", ".join("+".join([a] if isinstance(a, str) else a or ["-"]) for a in axes)


def state_of(family: str, mesh: MeshConfig) -> TrainState:
    """The types of a run's fresh state, with their shardings; nothing is computed."""
    config = tiny_models.run_config(optimizer={"name": "adamw"})
    config.model = FAMILIES[family]  # the objective does not matter here
    with jax.set_mesh(make_mesh(mesh)):
        return jax.eval_shape(make_step(config).init)


def record(family: str) -> str:
    """A line for each mesh and parameter: its name, shape and sharding, and its moments'."""
    lines = []
    for title, mesh in MESHES.items():
        state = state_of(family, mesh)
        moments: dict[str, list[str]] = {name: [] for name in state.all_parameters}
        for path, x in jax.tree.leaves_with_path(state.optimizer):
            if (name := getattr(path[-1], "key", None)) in moments:
                moments[name].append(f"{list(x.shape)} {spec(x)}")
        lines += [f"mesh: {title}", ""]
        for name, x in sorted(state.all_parameters.items()):
            here = f"{list(x.shape)} {spec(x)}"
            said = [m if m != here else "the same" for m in moments[name]]
            said = f"moments: {'; '.join(said)}" if said else "frozen"
            lines.append(f"{name:<34} {list(x.shape)!s:<14} {spec(x):<32} {said}")
        lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_shardings_are_those_on_record(family):
    path = GOLDEN / f"{family}.txt"
    assert path.exists(), f"there is no record of {family}: write one with\n  {WRITE}"
    then, now = path.read_text().splitlines(), record(family).splitlines()
    changed = "\n".join(
        difflib.unified_diff(then, now, f"{path.name} on record", "now", lineterm="")
    )
    assert not changed, f"{changed}\n\nif this is meant: {WRITE}"


def test_each_record_is_of_a_family():
    assert {path.stem for path in GOLDEN.iterdir()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_lie_where_their_parameters_do(family):
    for line in (GOLDEN / f"{family}.txt").read_text().splitlines():
        if line and not line.startswith("mesh: "):
            assert line.endswith((" moments: the same; the same", " frozen")), line
            learns = family != "lora" and not line.startswith("pooler")  # which no objective sees
            assert not (learns and line.endswith("frozen")), line


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"to write the records anew: {WRITE}")
    GOLDEN.mkdir(exist_ok=True)
    for name in FAMILIES:
        (GOLDEN / f"{name}.txt").write_text(record(name))
    print(f"wrote {len(FAMILIES)} files: look at them with git diff {GOLDEN}")
