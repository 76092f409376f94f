"""Published models to runs and back: python -m lm_jax.convert --model=DIR --output=DIR

A Hugging Face folder becomes the workdir of a run of no steps; a run becomes a Hugging Face folder,
adapters merged, that Transformers loads. Training, generation and evaluation take either as it is.
"""

import sys

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_STEP = flags.DEFINE_integer("step", None, "Of a run, which checkpoint; default: the newest.")
_OUTPUT = flags.DEFINE_string("output", None, "A new folder.")
_TO = flags.DEFINE_enum(
    "to",
    None,
    ["huggingface", "workdir", "peft"],
    "What to write; default: huggingface for a run, workdir for a Hugging Face folder. peft: a"
    " run's adapters by themselves.",
)
_FAMILY = flags.DEFINE_string(
    "family",
    None,
    "The model_type to write; default: that of the published model it comes from, or"
    " the first that has this shape.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of a Hugging Face folder's weights."
)
_SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "The most of one file of weights, in GB.", 1e-6)
_VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Compare logits with Transformers (which needs torch and transformers), and fail if they"
    " differ by more than rounding.",
)


def main(argv: list[str]) -> None:
    del argv
    path = cli.model_of(_MODEL)
    if not _OUTPUT.value:
        raise UserError("where to? give --output=DIR, a new folder")

    with cli.importing():
        from lm_jax import runtime
        from lm_jax.training import conversion, weights
    runtime.configure()

    published = weights.find(path, _STEP.value).step is None
    to = _TO.value or ("workdir" if published else "huggingface")
    if to == "peft":
        if published:
            raise UserError(f"--to=peft: '{path}' is a published model, and no run with adapters")
        if _VERIFY.value:
            raise UserError("--verify does not go with --to=peft: verify the merged model")
        base = conversion.to_peft(path, _OUTPUT.value, _STEP.value)
        print(f"wrote the adapters to {_OUTPUT.value}; they belong to {base}")
        return
    if to == "workdir" and not published:
        raise UserError(f"--to=workdir: '{path}' is a run's workdir already")
    loaded = conversion.load(path, _STEP.value)
    if to == "workdir":
        conversion.to_workdir(loaded, _OUTPUT.value)
        reference = path
        print(f"wrote a workdir to {_OUTPUT.value}")
        if _VERIFY.value:
            loaded = conversion.load(_OUTPUT.value)  # what was written
    else:
        family, missing = conversion.to_huggingface(
            loaded,
            _OUTPUT.value,
            family=_FAMILY.value,
            dtype=_DTYPE.value,
            max_shard_bytes=int(_SHARD_GB.value * 1e9),
        )
        reference = _OUTPUT.value
        print(f"wrote a {family} model to {_OUTPUT.value}")
        if missing:
            print(f"without a tokenizer: {missing}", file=sys.stderr)
    if _VERIFY.value:
        comparison = conversion.compare(loaded, reference)
        print(f"compared with Transformers: {comparison}")
        if not comparison.agree("float32" if to == "workdir" else _DTYPE.value):
            raise UserError("the logits differ by more than rounding: do not use what was written")


if __name__ == "__main__":
    cli.run(main)
