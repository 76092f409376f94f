"""The layout: imports point one way, files stay short, entry points start fast."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

import lm_jax

FOLDER = pathlib.Path(lm_jax.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
ENTRY_POINTS = [
    name for name, path in MODULES.items() if '__name__ == "__main__"' in path.read_text("utf-8")
]


def imports(path: pathlib.Path, *, top_only: bool) -> set[str]:
    """The modules of lm_jax that a file imports, at its top or anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return {name for name in found if name in MODULES}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules that lie on a cycle or between two, found by taking away leaves and roots."""
    left = {node: set(targets) for node, targets in graph.items()}
    while True:
        used = set().union(*left.values()) if left else set()
        gone = {node for node, targets in left.items() if not targets or node not in used}
        if not gone:
            return sorted(left)
        left = {n: targets - gone for n, targets in left.items() if n not in gone}


@pytest.mark.parametrize("top_only", [True, False], ids=["top", "in functions too"])
def test_no_cycle_of_imports(top_only):
    graph = {name: imports(path, top_only=top_only) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 50
    assert cycle(graph) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


# Each may import itself and what stands before it.
ORDER = ["base", "sharding", "model", "data", "interop"]
ORDER += ["generation", "evaluation", "inspection", "training", "reporting", "evaluators"]
ORDER += ["planning", "serving", "entry"]
BASE = {"lm_jax"} | {
    f"lm_jax.{name}"
    for name in (
        *("config", "config_keys", "config_json", "errors", "cli", "runtime", "host_memory"),
        *("model_validation", "example_validation", "validation", "json_text"),
        *("applications", "cluster", "rendezvous", "page", "paths", "progress", "template"),
    )
}


def place(module: str) -> str:
    if module in BASE:
        return "base"
    return "entry" if module.count(".") == 1 else module.split(".")[1]


def test_packages_point_one_way():
    rooms = {place(name) for name in MODULES if name.count(".") > 1}
    assert rooms <= set(ORDER)
    wrong = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        for target in imports(path, top_only=False)
        if place(name) in ORDER and ORDER.index(place(name)) < ORDER.index(place(target))
    ]
    assert wrong == []


def test_files_that_are_no_code_are_part_of_the_package():
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {
        path
        for package, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in FOLDER.parent.joinpath(*package.split(".")).glob(pattern)
    }
    there = {path for path in FOLDER.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert there == declared and len(there) == 8


def test_no_file_is_longer_than_400_lines():
    lengths = {str(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert {p: n for p, n in lengths.items() if n > 400} == {}


def test_the_commands_are_found():
    assert {"lm_jax.train", "lm_jax.evaluate", "lm_jax.generate"} <= set(ENTRY_POINTS)


def test_what_is_there_for_the_tests_is_imported_to_compare_with_it_alone():
    """TensorFlow nowhere, as nothing needs it."""
    foreign = {"torch", "transformers", "peft", "safetensors", "sentence_transformers"}
    foreign |= {"tensorflow", "pytest"}
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            found += [f"{name}: {n}" for n in names if n.partition(".")[0] in foreign]
    assert set(found) == {"lm_jax.interop.verify: torch", "lm_jax.interop.verify: transformers"}


def test_entry_points_and_config_load_nothing_heavy():
    heavy = ("jax", "flax", "tensorflow", "torch", "grain", "tensorflow_datasets", "orbax",
             "sentencepiece", "tokenizers", "optax", "pyarrow")  # fmt: skip
    code = (
        "import importlib, sys\n"
        f"for name in {[*ENTRY_POINTS, 'lm_jax.validation']}:\n"
        "    for module in [m for m in sys.modules if m.startswith('lm_jax')]:\n"
        "        del sys.modules[module]\n"  # each defines the same flags
        "    from absl import flags\n"
        "    for flag in list(flags.FLAGS): delattr(flags.FLAGS, flag)\n"
        "    importlib.import_module(name)\n"
        f"    loaded = [h for h in {heavy} if h in sys.modules]\n"
        "    assert not loaded, (name, loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_import_begins_a_backend():
    """A command imports what it needs before it joins the other processes of its job."""
    modules = sorted(MODULES.keys() - {*ENTRY_POINTS})
    code = (
        "import gc, importlib\n"
        "from lm_jax import cli\n"
        "with cli.importing():\n"
        f"    for name in {modules}: importlib.import_module(name)\n"
        "    with cli.importing(): pass\n"
        "    assert not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_says_what_a_command_does(name):
    done = subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True)
    assert f"python -m {name}" in done.stdout
    assert "Traceback" not in done.stderr
