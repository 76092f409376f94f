"""python -m lm_jax.evaluate --model=DIR [--source=PATH ...]

Loss, perplexity, accuracy and bits per byte of a text under a trained model; without a source, of
the run's own validation split. A masked language model is measured on masked tokens.

python -m lm_jax.evaluate --task=crows_pairs --model=DIR --source=FILE.csv [--output=FILE.jsonl]

How often the model finds the more stereotypical of two sentences more probable, overall and by
category (CrowS-Pairs, Nangia et al. 2020); --output gets the scores of each pair.

python -m lm_jax.evaluate --task=lm_eval:TASK[,TASK] --model=DIR [--task_path=FOLDER]

Tasks of lm-evaluation-harness, or your own in its form in FOLDER (needs pip install
'lm_jax[lm_eval]', which takes neither PyTorch nor Transformers); --output gets each example.
"""

import json
from typing import Any

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_TASK = flags.DEFINE_string(
    "task", None, "Which task: crows_pairs, or lm_eval:TASK[,TASK]. Default: the loss of a text."
)
_TASK_PATH = flags.DEFINE_string("task_path", None, "Of lm_eval: a folder of your own task files.")
_SOURCE = flags.DEFINE_multi_string(
    "source",
    [],
    "What to evaluate on, all of it: as data.sources. May be given more than once. Of a task, its"
    " file.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Of a task: a new file for the single scores.")
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
    if _TASK.value is not None:
        print(json.dumps(_run_task(_TASK.value, model)))
        return
    for flag in (_OUTPUT, _TASK_PATH):
        if flag.value is not None:
            raise UserError(f"--{flag.name}: has no meaning without --task: leave it out")

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


def _run_task(task: str, model: str) -> dict[str, Any]:
    kind, _, names = task.partition(":")
    names = [name for name in names.split(",") if name]
    if not (task == "crows_pairs" or (kind == "lm_eval" and names)):
        raise UserError(f"--task: no task '{task}' (there are crows_pairs and lm_eval:TASK[,TASK])")
    if kind == "crows_pairs" and len(_SOURCE.value) != 1:
        raise UserError(
            f"--source: crows_pairs needs one file, the authors' CSV, not {len(_SOURCE.value)}"
        )
    unused = (_SOURCE,) if kind == "lm_eval" else (_TASK_PATH,)
    for flag in (*unused, _DOCUMENT, _TEXT_KEY, _ON_ERROR, _LENGTH, _MAX_BATCHES):
        if flag.value not in (None, []):
            raise UserError(f"--{flag.name}: has no meaning for --task={kind}: leave it out")
    if _OUTPUT.value:
        cli.check_new_file("output", _OUTPUT.value)

    from lm_jax import runtime

    runtime.configure()

    from lm_jax.training.standard_tasks import run_crows_pairs, run_lm_eval

    settings = {
        "output": _OUTPUT.value,
        "step": _STEP.value,
        "dtype": _DTYPE.value,
        "batch_size": _BATCH_SIZE.value,
    }
    if kind == "lm_eval":
        return run_lm_eval(model, names, task_path=_TASK_PATH.value, **settings)
    return run_crows_pairs(model, _SOURCE.value[0], **settings)


if __name__ == "__main__":
    cli.run(main)
