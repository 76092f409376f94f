"""python -m lm_jax.evaluate --model=DIR [--source=PATH ...]

Loss, perplexity, accuracy and bits per byte of a text under a trained model; without a source, of
the run's own validation split. A masked language model is measured on masked tokens.

python -m lm_jax.evaluate --task=TASK --model=DIR [--source=FILE ...] [--output=FILE.jsonl]

An application on examples, such as translate. Answers are scored as the field does, with 95%
intervals. --output gets each prediction; one that was begun is gone on with.

python -m lm_jax.evaluate --task=crows_pairs --model=DIR --source=FILE.csv [--output=FILE.jsonl]

How often the model finds the more stereotypical of two sentences more probable, overall and by
category (CrowS-Pairs, Nangia et al. 2020); --output gets the scores of each pair, and is gone on
with.

python -m lm_jax.evaluate --task=lm_eval:TASK[,TASK] --model=DIR [--task_path=FOLDER]

Tasks of lm-evaluation-harness, or your own in its form in FOLDER (needs pip install
'lm_jax[lm_eval]', which takes neither PyTorch nor Transformers); --output gets each example.

Of several processes (--coordinator and so on, or a cluster's variables), all are started with the
same command, and share the work; the first one prints and writes.
"""

import json
import sys
from typing import Any

from absl import flags

from lm_jax import cli
from lm_jax.applications import APPLICATIONS, find
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_JOB = cli.define_job_flags("evaluate")
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
    "output",
    None,
    "Of a task: a file for the single predictions or scores; beside it, FILE.report.json gets the"
    " result. The same command goes on with what is there.",
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Of an application: as data.prompt; default: the run's, or the task's."
)
_TARGET = flags.DEFINE_string("target", None, "As data.target; default: the run's, or the task's.")
_CONTEXT = flags.DEFINE_string("context", None, "As data.context; default: the run's.")
_UNANSWERABLE = flags.DEFINE_bool(
    "unanswerable", None, "As data.unanswerable; default: the run's, or no."
)
_NULL_THRESHOLD = flags.DEFINE_float(
    "null_threshold", None, "As task.null_threshold; default: the run's, or 0."
)
_MAX_EXAMPLES = flags.DEFINE_integer(
    "max_examples", None, "The first so many, of each task; default: all.", 1
)
_SHOTS = flags.DEFINE_integer(
    "shots", None, "Of lm_eval: solved examples before each question; default: the task's.", 0
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Of an answer; default: the run's, or the task's.", 1
)
_METRICS = flags.DEFINE_list(
    "metrics", None, "Of an application, with commas, such as bleu,perplexity; default: the run's."
)
_BEAMS = flags.DEFINE_integer("beams", None, "1: greedily; default: the run's, or 1.", 1)
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", None, "Of beams: the more, the longer the text; default: the run's, or 1."
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
_QUANTIZE = cli.define_quantize_flag()
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    None,
    "Rows at a time; default: the run's, or 8; of applications 16, of scores of texts 32.",
    1,
)
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices to share the parameters out over.", 1)
_TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Devices to split each layer over; the batch is split over those that are left.", 1
)
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens a row; default: the run's; of a published model its longest, to 1024."
)
_MAX_BATCHES = flags.DEFINE_integer("max_batches", None, "A sample of so many; default: all.", 1)

# What is evaluated -> the flags that are about it alone.
_OWN = {
    "": (_SOURCE, _DOCUMENT, _TEXT_KEY, _ON_ERROR, _LENGTH, _MAX_BATCHES),
    "crows_pairs": (_SOURCE, _OUTPUT),
    "lm_eval": (_TASK_PATH, _OUTPUT, _MAX_EXAMPLES, _SHOTS),
    "application": (_SOURCE, _OUTPUT, _ON_ERROR, _PROMPT, _TARGET, _CONTEXT, _UNANSWERABLE,
                    _NULL_THRESHOLD, _MAX_EXAMPLES, _METRICS, _MAX_TOKENS, _BEAMS, _LENGTH_PENALTY),
}  # fmt: skip


def main(argv: list[str]) -> None:
    del argv
    path, task = cli.model_of(_MODEL), _TASK.value or ""
    kind, _, names = task.partition(":") if task.startswith("lm_eval:") else (task, "", "")
    if kind not in _OWN:
        find(kind)
    given = _given(kind if kind in _OWN else "application")

    with cli.importing():
        from lm_jax import runtime
        from lm_jax.evaluators import application, crows_pairs, lm_eval, loss
        from lm_jax.evaluators.models import ModelOptions, prints
    runtime.configure(*_JOB())

    options = ModelOptions(
        _STEP.value,
        _DTYPE.value,
        _QUANTIZE.value,
        _BATCH_SIZE.value,
        _FSDP.value,
        _TENSOR.value,
    )
    match kind:
        case "":
            report = loss.evaluate_model(path, options, **given)
        case "crows_pairs":
            report = crows_pairs.run_crows_pairs(path, options, **given)
        case "lm_eval":
            report = lm_eval.run_lm_eval(path, names, options, **given)
        case _:
            report, result = application.evaluate_task(path, task, options, **given)
            if prints():
                print(application.to_text(result), file=sys.stderr, flush=True)
    if prints():
        print(json.dumps(report))


def _given(kind: str) -> dict[str, Any]:
    """The flags of this kind of evaluation that are given, by name.

    Raises:
      UserError: another flag is given, that says nothing here.
    """
    given = {f.name: f.value for own in _OWN.values() for f in own if f.value not in (None, [])}
    for name in given.keys() - {flag.name for flag in _OWN[kind]}:
        where = f"for --task={_TASK.value}" if _TASK.value else "without --task"
        raise UserError(f"--{name}: has no meaning {where}: leave it out")
    return {"sources" if name == "source" else name: value for name, value in given.items()}


if __name__ == "__main__":
    cli.run(main)
