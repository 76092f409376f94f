"""Applications: the one home of what each is called, asks and is scored by.

The config takes their names from here, recipes their words, `evaluate` both. This file imports
nothing heavy.
"""

import dataclasses
import difflib

from lm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Application:
    """What `--task` and `task.name` stand for.

    Attributes:
      objectives: those of the models that can do it. A published model that was not trained on
        examples is asked as one of the first; if it chats, as one of 'chat'.
      metrics: keys of `lm_jax.evaluation.metrics.METRICS`, the most telling one first.
      prompt, target: templates, in the words that recipes teach and in which a model is asked that
        has not learned any. '': there are none that would do for all.
      max_tokens: of an answer.
    """

    objectives: tuple[str, ...]
    metrics: tuple[str, ...]
    prompt: str = ""
    target: str = ""
    max_tokens: int = 128


APPLICATIONS = {
    "translate": Application(("complete", "chat"), ("bleu", "chrf")),  # which languages?
    "sentiment": Application(
        ("classify",), ("accuracy", "macro_f1"), prompt="{text}", target="{label}"
    ),
    "summarize": Application(
        ("complete", "chat"),
        ("rougeL", "rouge1", "rouge2"),
        prompt="Summarize the following dialogue.\n\n{dialogue}",
        target="{summary}",
    ),
    "answer": Application(
        ("complete", "chat", "extract"),
        ("f1", "exact_match"),
        prompt="Answer the question with a few words of the text.\n\nText: {context}\n\n"
        "Question: {question}",
        target="{answers}",
        max_tokens=32,
    ),
    "instruct": Application(
        ("chat", "complete"), ("rougeL", "chrf"), prompt="{messages}", max_tokens=256
    ),
}

# Templates where an answer is a part of a text (objective 'extract').
EXTRACT = {"prompt": "{question}", "context": "{context}", "target": "{answers}"}


def find(name: str) -> Application:
    """
    Raises:
      UserError: there is no such application.
    """
    if name not in APPLICATIONS:
        near = difflib.get_close_matches(name, APPLICATIONS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"--task: no task '{name}'{hint} (there are {', '.join(APPLICATIONS)}, crows_pairs and"
            " lm_eval:TASK[,TASK])"
        )
    return APPLICATIONS[name]
