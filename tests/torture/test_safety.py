"""Nothing that is read is run: no pickles, no evaluation of data, no shell, no path out of a
folder, and templates that come with models are kept within bounds."""

import ast
import json
import os
import pathlib
import resource

import pytest

import lm_jax
from lm_jax.data.chat import ChatTemplate
from lm_jax.errors import UserError
from lm_jax.interop.safetensors import open_weights
from lm_jax.interop.sentence import read_pooling

FOLDER = pathlib.Path(lm_jax.__file__).parent
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load",
         "os.system", "os.popen", "numpy.load", "np.load", "jnp.load", "shutil.unpack_archive",
         "pd.read_pickle"}  # fmt: skip


def unsafe(source: str) -> list[str]:
    """What of a module runs what it reads, or could: lines and names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            found += [f"{node.lineno}: {n}" for n in names if n.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name.endswith((".extract", ".extractall")) and flags.get("filter") != "'data'":
                found.append(f"{node.lineno}: {name}")
            if name.endswith(".load") and flags.get("allow_pickle") == "False":
                continue
            if name in CALLS or "shell" in flags or flags.get("allow_pickle", "False") != "False":
                found.append(f"{node.lineno}: {name}")
            if flags.get("trust_remote_code", "False") != "False":
                found.append(f"{node.lineno}: {name}")
    return found


def test_no_module_runs_what_it_reads():
    assert unsafe("import pickle\nnp.load(x)\neval(x)\nf(x, shell=y)\nt.extractall(x)") == [
        "1: pickle", "2: np.load", "3: eval", "4: f", "5: t.extractall",
    ]  # fmt: skip
    safe = ("np.load(x, allow_pickle=False)", "model.eval()", "t.extractall(x, filter='data')")
    assert not unsafe("\n".join(safe))
    found = {str(p.relative_to(FOLDER)): unsafe(p.read_text("utf-8")) for p in FOLDER.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/secret.safetensors", "a/../../secret.safetensors",
             "..\\secret.safetensors", "a\0.safetensors", "secret.bin", ".."],
)  # fmt: skip
def test_an_index_leads_nowhere_else(name, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"x": str(tmp_path) + name if name.startswith("/") else name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected the plain name of a safetensors file"):
        open_weights(folder)


def test_links_that_lie_in_the_folder_itself_are_followed(tmp_path):
    """As Hugging Face's cache has them: whoever made the folder made them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "model").mkdir()
    os.symlink("../blobs/1", tmp_path / "model" / "model.safetensors")
    assert open_weights(tmp_path / "model").names() == []


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a\0b"])
def test_modules_of_sentence_transformers_lead_nowhere_else(path, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": path}]))
    with pytest.raises(UserError, match="leads out of the folder"):
        read_pooling(str(tmp_path))


GROW = "{% set ns = namespace(x='ab') %}{% for i in range(64) %}"
BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * ['a'] }}",
    "{{ 9 ** 99999 ** 9 }}",
    GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    GROW + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    GROW + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    GROW + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    GROW + "{% set ns.x = ns.x|replace('', ns.x) %}{% endfor %}",
    GROW + "{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    GROW.replace("'ab'", "3") + "{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ [1]|batch(10**9, 1)|list }}",
    "{{ [1]|slice(10**9)|list }}",
    "{{ 'a'|indent(10**9, true) }}",
    "{{ lipsum(n=10**9) }}",
    "{% for i in range(999) %}{% for j in range(9999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_no_template_takes_the_time_or_the_memory(text):
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    try:
        with pytest.raises(UserError, match="the chat template does not take these") as e:
            ChatTemplate(text, {}).render([{"role": "user", "content": "hi"}])
        assert not isinstance(e.value.__cause__, MemoryError)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "text", ["{% for i in x %}" * 30 + "{% endfor %}" * 30, "{{ " + "(" * 9999]
)
def test_a_template_that_python_cannot_compile_is_a_message(text):
    with pytest.raises(UserError, match="the chat template"):
        ChatTemplate(text, {})


def test_a_long_conversation_is_rendered():
    """Bounds are far from what a template needs."""
    text = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index0 == messages|length -"
        " 1 %}last {% endif %}{{ '<|' + m['role'] + '|>' + m.content.split('x')[-1]|trim }}"
        "{% set ns.n = ns.n + m.content|length %}{% if m.role in ['user', 'b'] %}{{ ns.n }}"
        "{% endif %}{{ m|tojson(indent=2)|replace('a', 'bc') }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "a" * 1500}] * 600
    assert len(ChatTemplate(text, {}).render(messages)) > 1_800_000
