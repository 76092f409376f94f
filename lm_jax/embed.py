"""Texts as vectors: python -m lm_jax.embed --model=DIR --text='...' [--text_file=FILE]

The states of a BERT (or of any model), pooled over each text's tokens as the model's own
modules.json says, where it has one, else their mean. Writes JSON lines, or an array to a .npy file.
"""

import json
import os
import sys

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_STEP = flags.DEFINE_integer("step", None, "Of a run, which checkpoint; default: the newest.")
_DTYPE = cli.define_dtype_flag()
_QUANTIZE = cli.define_quantize_flag()
_TEXT = flags.DEFINE_multi_string("text", [], "A text; may be repeated.")
_TEXT_FILE = flags.DEFINE_string(
    "text_file", None, "More texts: one a line, or (.jsonl) objects with the key 'text'."
)
_POOLING = flags.DEFINE_enum(
    "pooling", None, ["mean", "first", "last"], "Of the tokens' states; default: the model's."
)
_NORMALIZE = flags.DEFINE_bool("normalize", None, "To length 1; default: the model's, else yes.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "A text's first so many; default: the model's, else its longest sequence."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Texts at a time.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "A new file: .npy, or JSON lines; default: stdout.")


def main(argv: list[str]) -> None:
    del argv
    path, output = cli.model_of(_MODEL), _OUTPUT.value
    if output:
        cli.check_new_file("output", output)

    from lm_jax.generation.prompts import read_prompts

    texts = list(_TEXT.value)
    if _TEXT_FILE.value:
        texts += read_prompts(_TEXT_FILE.value, key="text", flag="text_file")
    if not texts:
        raise UserError("which texts? give --text='...' or --text_file=FILE")

    with cli.importing():
        import jax
        import numpy as np

        from lm_jax import runtime
        from lm_jax.config import MeshConfig
        from lm_jax.generation.embedding import Pooling, embed
        from lm_jax.interop.sentence import read_pooling
        from lm_jax.sharding.mesh import make_mesh
        from lm_jax.training.inference import load_for_inference
    runtime.configure()

    fields = read_pooling(path)
    given = {
        "kind": _POOLING.value,
        "normalize": _NORMALIZE.value,
        "max_tokens": _MAX_TOKENS.value,
    }
    fields |= {key: value for key, value in given.items() if value is not None}
    mesh = make_mesh(MeshConfig())
    loaded = load_for_inference(path, mesh, _STEP.value, _DTYPE.value, _QUANTIZE.value)
    with jax.set_mesh(mesh):
        vectors, cut = embed(
            loaded.model, loaded.tokenizer, texts, Pooling(**fields), batch_size=_BATCH_SIZE.value
        )
    if cut:
        print(f"{cut} of {len(texts)} texts were cut at the longest length", file=sys.stderr)
    if output and output.endswith(".npy"):
        np.save(output, vectors)
    else:
        with open(output, "x", encoding="utf-8") if output else _stdout() as f:
            for text, vector in zip(texts, vectors):
                record = {"text": text, "embedding": [round(float(v), 7) for v in vector]}
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
    if output:
        shape = " x ".join(map(str, vectors.shape))
        print(f"wrote {shape} numbers to {output}", file=sys.stderr)


def _stdout():
    return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
