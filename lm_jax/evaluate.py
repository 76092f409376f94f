"""python -m lm_jax.evaluate --model=DIR [--source=PATH ...]

Loss, perplexity, accuracy and bits per byte of a text under a trained model; without a source, of
the run's own validation split. A masked language model is measured on masked tokens.
"""

import json

from absl import flags

from lm_jax import cli

_MODEL = cli.define_model_flag()
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "What to evaluate on, all of it: as data.sources. May be given more than once."
)
_DOCUMENT = flags.DEFINE_enum(
    "document", None, ["file", "paragraph", "line"], "As data.document; default: the run's."
)
_TEXT_KEY = flags.DEFINE_string("text_key", None, "As data.text_key; default: the run's.")
_ON_ERROR = flags.DEFINE_enum(
    "on_error", None, ["raise", "skip"], "As data.on_error; default: the run's."
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.")
_DTYPE = cli.define_dtype_flag()
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows at a time; default: the run's, or 8.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens a row; default: the run's; of a published model its longest, to 1024."
)
_MAX_BATCHES = flags.DEFINE_integer("max_batches", None, "A sample of so many; default: all.")


def main(argv: list[str]) -> None:
    del argv
    model = cli.model_of(_MODEL)

    from lm_jax import runtime

    runtime.configure()

    from lm_jax.training.evaluation import evaluate_model

    overrides = {
        "document": _DOCUMENT.value,
        "text_key": _TEXT_KEY.value,
        "length": _LENGTH.value,
        "on_error": _ON_ERROR.value,
        "validation_sources": tuple(_SOURCE.value) or None,
    }
    result = evaluate_model(
        model,
        step=_STEP.value,
        dtype=_DTYPE.value,
        batch_size=_BATCH_SIZE.value,
        max_batches=_MAX_BATCHES.value,
        **{key: value for key, value in overrides.items() if value is not None},
    )
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
