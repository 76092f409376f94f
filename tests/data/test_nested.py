"""Fields that hold lists and objects: each recipe has the same examples from TFDS and other files.

The data sets of TFDS are prepared and read without TensorFlow.
"""

import json
import os
import subprocess
import sys

import commands
import pytest

from lm_jax.data.nested import flat

PREPARE = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds

F = tfds.features
FEATURES = {
    "translate": {"en": F.Text(), "de": F.Text()},
    "sentiment": {"text": F.Text(), "label": F.ClassLabel(names=["negative", "positive"])},
    "summarize": {"dialogue": F.Text(), "summary": F.Text()},
    "answer": {
        "context": F.Text(), "question": F.Text(),
        "answers": F.Sequence({"text": F.Text(), "answer_start": np.int32}),
    },
    "instruct": {"messages": F.Sequence({"role": F.Text(), "content": F.Text()})},
}

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in FEATURES]

    def _info(self):
        features = F.FeaturesDict(FEATURES[self.builder_config.name])
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        records = RECORDS[self.builder_config.name]
        return {"train": self._generate_examples(records),
                "test": self._generate_examples(records[:1]),
                "unsupervised": self._generate_examples(records)}

    def _generate_examples(self, records):
        yield from enumerate(records)

RECORDS = json.load(open(sys.argv[1]))
for name in FEATURES:
    Tiny(config=name, file_format=tfds.core.FileFormat.ARRAY_RECORD).download_and_prepare()
assert "tensorflow" not in sys.modules
"""
READ = """
import importlib.util, json, pathlib, sys
from lm_jax.data.loader import train_stream
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.validation import validate

def examples(recipe, source, held_out):
    name, _, variant = recipe.partition(":")
    spec = importlib.util.spec_from_file_location(name, pathlib.Path("configs") / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant or "tiny")
    config.data.sources, config.data.validation_sources = (source,), (held_out,)
    config.data.epochs = config.data.lanes = 1  # a batch of what there is
    data = validate(config).data
    with train_stream(data, BytesTokenizer(), seed=0) as stream:
        assert next(stream)["weights"].sum() > 0
    return [list(map(repr, documents(data, split))) for split in ("train", "validation")]

found = {tuple(asked): examples(*asked) for asked in json.load(open(sys.argv[1]))}
assert "tensorflow" not in sys.modules
print(json.dumps(list(found.values())))
"""
RECIPES = ["translate", "sentiment", "summarize", "answer", "answer:extract_tiny", "instruct"]


def records(i: int) -> dict[str, dict]:
    """Record i of each recipe's kind, as TFDS takes it to be stored."""
    who = ("dög", "cat", "man")[i % 3]
    answers = {"text": [who, f"the {who}"][: 1 + i % 2], "answer_start": [4, 0][: 1 + i % 2]}
    said = [("user", f"Who? {i}"), ("assistant", who), ("user", "Sure?"), ("assistant", "Yes.")]
    said = [{"role": role, "content": content} for role, content in said]
    return {
        "translate": {"en": f"the {who} runs", "de": f"{who} rennt"},
        "sentiment": {"text": f"a {who}", "label": i % 2},
        "summarize": {"dialogue": f"A: a {who}!", "summary": who},
        "answer": {"context": f"the {who} runs", "question": "Who?", "answers": answers},
        "instruct": {"messages": said[: 2 + 2 * (i % 2)]},
    }


def run(script, argument, tmp_path):
    """In another process, where a TensorFlow that cannot be imported stands before any other."""
    (tmp_path / "path" / "tensorflow").mkdir(parents=True, exist_ok=True)
    (tmp_path / "path" / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "argument.json").write_text(json.dumps(argument))
    path = [str(tmp_path / "path"), str(commands.ROOT), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "argument.json")],
        env=commands.environment()
        | {"TFDS_DATA_DIR": str(tmp_path / "tfds"), "PYTHONPATH": os.pathsep.join(path)},
        cwd=commands.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_recipe_has_the_same_examples_from_tfds_parquet_and_json(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    every = [records(i) for i in range(4)]
    by_name = {name: [one[name] for one in every] for name in every[0]}
    run(PREPARE, by_name, tmp_path)
    asked = []
    for recipe in RECIPES:
        name = recipe.partition(":")[0]
        lines = [json.dumps(record) for record in by_name[name]]
        for part, some in (("train", lines), ("test", lines[:1])):
            (tmp_path / f"{name}.{part}.jsonl").write_text("\n".join(some))
            table = pa.Table.from_pylist(list(map(json.loads, some)))
            pq.write_table(table, tmp_path / f"{name}.{part}.parquet")
        for form in ("jsonl", "parquet"):
            asked.append(
                [recipe, *(str(tmp_path / f"{name}.{x}.{form}") for x in ("train", "test"))]
            )
        # Half of a split, and one of a name that is not looked for.
        asked.append([recipe, f"tfds:tiny/{name}", f"tfds:tiny/{name}"])
        asked.append([recipe, f"tfds:tiny/{name}[unsupervised]", f"tfds:tiny/{name}[train[:25%]]"])
    found = json.loads(run(READ, asked, tmp_path).splitlines()[-1])
    assert len(found) == 4 * len(RECIPES)
    for i in range(0, len(found), 4):
        train, test = found[i]
        assert len(train) == 4 and test == train[:1] and "dög" in train[0]
        assert found[i + 1 : i + 4] == [found[i]] * 3, asked[i]


@pytest.mark.parametrize(
    ("nested", "wanted"),
    [
        ({"a": 1, "b": [2], "c": {"d": 3}}, {}),
        ({"answers": ["x"], "answer_starts": 5}, {}),
        ({"answers": {"text": [], "answer_start": []}}, {"answers": [], "answer_starts": []}),
        ({"answers": {"text": "x", "answer_start": 2}}, {"answers": ["x"], "answer_starts": [2]}),
        ({"answers": [{"text": "x"}]}, {"answers": ["x"]}),
        ({"answers": [{"text": "x", "answer_start": 1}], "answer_starts": [7]}, {"answers": ["x"]}),
        ({"c": {"d": [1, 2], "e": [3, 4]}}, {"c": [{"d": 1, "e": 3}, {"d": 2, "e": 4}]}),
        ({"c": {"d": [1, 2], "e": [3]}}, {}),
        ({"c": {}}, {}),
    ],
)
def test_what_is_flat(nested, wanted):
    assert flat(nested) == nested | wanted
