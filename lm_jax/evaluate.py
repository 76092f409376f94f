"""python -m lm_jax.evaluate --model=DIR [--source=PATH ...]

Loss, perplexity, accuracy and bits per byte of a text under a trained model; without a source, of
the run's own validation split. A masked language model is measured on masked tokens.

python -m lm_jax.evaluate --task=TASK --model=DIR [--source=FILE ...] [--output=FILE.jsonl]

An application on examples, such as translate. Answers are scored as the field does, with 95%
intervals. --output gets each prediction; one that was begun is gone on with.

python -m lm_jax.evaluate --task=crows_pairs --model=DIR --source=FILE.csv [--output=FILE.jsonl]

How often the model finds the more stereotypical of two sentences more probable, overall and by
category (CrowS-Pairs, Nangia et al. 2020); --output gets the scores of each pair.

python -m lm_jax.evaluate --task=lm_eval:TASK[,TASK] --model=DIR [--task_path=FOLDER]

Tasks of lm-evaluation-harness, or your own in its form in FOLDER (needs pip install
'lm_jax[lm_eval]', which takes neither PyTorch nor Transformers); --output gets each example.
"""

import json
import sys
from typing import Any

from absl import flags

from lm_jax import cli
from lm_jax.applications import APPLICATIONS
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_TASK = flags.DEFINE_string(
    "task",
    None,
    f"Which task: {', '.join(APPLICATIONS)}, crows_pairs, or lm_eval:TASK[,TASK]. Default: the loss"
    " of a text.",
)
_TASK_PATH = flags.DEFINE_string("task_path", None, "Of lm_eval: a folder of your own task files.")
_SOURCE = flags.DEFINE_multi_string(
    "source",
    [],
    "What to evaluate on, all of it: as data.sources. May be given more than once. Of crows_pairs,"
    " its file.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Of a task: a file for the single predictions or scores."
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Of an application: as data.prompt; default: the run's, or the task's."
)
_TARGET = flags.DEFINE_string("target", None, "As data.target; default: the run's, or the task's.")
_MAX_EXAMPLES = flags.DEFINE_integer("max_examples", None, "The first so many; default: all.", 1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Of an answer; default: the task's.", 1)
_BEAMS = flags.DEFINE_integer("beams", None, "1: greedily; default: the run's, or 1.", 1)
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", None, "Of beams: above 1 favours long answers; default: the run's, or 1."
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

# What is evaluated -> the flags that are about it alone.
_OWN = {
    "loss": (_SOURCE, _DOCUMENT, _TEXT_KEY, _ON_ERROR, _LENGTH, _MAX_BATCHES),
    "crows_pairs": (_SOURCE, _OUTPUT),
    "lm_eval": (_TASK_PATH, _OUTPUT),
    "application": (_SOURCE, _OUTPUT, _ON_ERROR, _PROMPT, _TARGET, _MAX_EXAMPLES, _MAX_TOKENS,
                    _BEAMS, _LENGTH_PENALTY),
}  # fmt: skip


def main(argv: list[str]) -> None:
    del argv
    model, task = cli.model_of(_MODEL), _TASK.value
    kind, _, names = (task or "").partition(":")
    if task is None:
        result = _loss(model)
    elif kind == "lm_eval":
        result = _lm_eval(model, [name for name in names.split(",") if name])
    elif task == "crows_pairs":
        result = _crows_pairs(model)
    else:
        result = _application(model, task)
    print(json.dumps(result))


def _prepare(kind: str, where: str) -> dict[str, Any]:
    """Checks that no flag is given that says nothing here; what all of them take."""
    taken = {flag.name for flag in _OWN[kind]}
    for flag in (flag for own in _OWN.values() for flag in own):
        if flag.name not in taken and flag.value not in (None, []):
            raise UserError(f"--{flag.name}: has no meaning {where}: leave it out")
    if _OUTPUT.value and kind != "application":
        cli.check_new_file("output", _OUTPUT.value)

    from lm_jax import runtime

    runtime.configure()
    return {"step": _STEP.value, "dtype": _DTYPE.value, "batch_size": _BATCH_SIZE.value}


def _loss(model: str) -> dict[str, Any]:
    settings = _prepare("loss", "without --task")

    from lm_jax.evaluators.loss import evaluate_model

    overrides = {
        "document": _DOCUMENT.value,
        "text_key": _TEXT_KEY.value,
        "length": _LENGTH.value,
        "on_error": _ON_ERROR.value,
        "validation_sources": tuple(_SOURCE.value) or None,
    }
    return evaluate_model(
        model,
        max_batches=_MAX_BATCHES.value,
        **settings,
        **{key: value for key, value in overrides.items() if value is not None},
    )


def _lm_eval(model: str, names: list[str]) -> dict[str, Any]:
    if not names:
        raise UserError("--task: name the harness's tasks, as in --task=lm_eval:piqa,sciq")
    settings = _prepare("lm_eval", "for --task=lm_eval")

    from lm_jax.evaluators.lm_eval import run_lm_eval

    return run_lm_eval(model, names, task_path=_TASK_PATH.value, output=_OUTPUT.value, **settings)


def _crows_pairs(model: str) -> dict[str, Any]:
    if len(_SOURCE.value) != 1:
        raise UserError(
            f"--source: crows_pairs needs one file, the authors' CSV, not {len(_SOURCE.value)}"
        )
    settings = _prepare("crows_pairs", "for --task=crows_pairs")

    from lm_jax.evaluators.crows_pairs import run_crows_pairs

    return run_crows_pairs(model, _SOURCE.value[0], output=_OUTPUT.value, **settings)


def _application(model: str, task: str) -> dict[str, Any]:
    settings = _prepare("application", f"for --task={task}")

    from lm_jax.evaluators.application import evaluate_task, to_text

    report, result = evaluate_task(
        model,
        task,
        sources=tuple(_SOURCE.value),
        prompt=_PROMPT.value,
        target=_TARGET.value,
        output=_OUTPUT.value,
        max_examples=_MAX_EXAMPLES.value,
        on_error=_ON_ERROR.value,
        max_tokens=_MAX_TOKENS.value,
        beams=_BEAMS.value,
        length_penalty=_LENGTH_PENALTY.value,
        **settings,
    )
    print(to_text(result), file=sys.stderr, flush=True)
    return report


if __name__ == "__main__":
    cli.run(main)
