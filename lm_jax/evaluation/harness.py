"""Standard tasks, as lm-evaluation-harness has them (Gao et al. 2021), of a model here.

Needs the extra: pip install 'lm_jax[lm_eval]'. It is asked for at the top of this file, so import
this file only where such a task is asked for.
"""

import difflib
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lm_jax.errors import UserError
from lm_jax.evaluation.output import Record
from lm_jax.generation.batching import GENERATED, READ, portions
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.generation.scoring import Scorer
from lm_jax.progress import progress

for _name in ("lm_eval", "datasets"):  # absl shows whatever is not told to be silent
    logging.getLogger(_name).setLevel(logging.WARNING)
try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
except ImportError as e:
    raise UserError(
        f"--task=lm_eval: '{e.name}' is not installed: pip install 'lm_jax[lm_eval]'"
    ) from None

_DEFAULT_TOKENS = 256  # to generate, where a task does not say; the harness's own number
_SHOTS_SEED = 1234  # draws the examples that stand before a question; the harness's own
OnDone = Callable[[int], None]  # called with the number of requests done
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """Answers the harness's three kinds of requests, all that it has of a kind at once."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        known: Iterable[Record] = (),
        on_answer: Callable[[Record], None] | None = None,
        show: bool = False,
    ):
        """
        Args:
          scorer: of a causal model.
          known: what `on_answer` was told before, of the same model.
          on_answer: called with each answer, fit for JSON, when its portion is done (`portions`):
            two batches of texts that are generated. Those that are drawn at random are not told.
          show: how far it has come.

        Raises:
          UserError: the model is not causal.
        """
        super().__init__()
        self.scorer, self.generator = scorer, Generator(scorer.model, scorer.tokenizer)
        self._known = {record["request"]: record["answer"] for record in known}
        self._on_answer, self._show = on_answer, show
        self.shortened = 0  # texts whose beginning did not fit into the model

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> list[tuple[float, bool]]:
        """(log p, whether greedy) of each (context, continuation)."""

        def answer(some: Sequence[Instance], on_done: OnDone) -> list[Any]:
            found = self.scorer.loglikelihood([r.args for r in some], on_done, _names(some))
            return [[f.log_p, f.greedy, f.cut > 0] for f in found]

        found = self._answered("loglikelihood", requests, answer)
        self.shortened += sum(cut for _, _, cut in found)
        return [(log_p, greedy) for log_p, greedy, _ in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        """log p of each whole text."""

        def answer(some: Sequence[Instance], on_done: OnDone) -> list[Any]:
            texts = [r.args[0] for r in some]
            found = self.scorer.loglikelihood_rolling(texts, on_done, _names(some))
            return [f.log_p for f in found]

        return self._answered("loglikelihood_rolling", requests, answer)

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        """What follows each context, up to one of the strings that the task stops at."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(i)
        out = [""] * len(requests)
        for (stop, max_tokens, sampling), chosen in groups.items():

            def answer(some, on_done, settings=(stop, max_tokens, sampling)):
                return self._generated(some, on_done, *settings)

            of_group = [requests[i] for i in chosen]
            if sampling.temperature > 0:
                # What is drawn depends on its place among the others: they stay together.
                with progress("requests", len(of_group), active=self._show) as count:
                    found = answer(of_group, count)
            else:
                found = self._answered("generate", of_group, answer)
            self.shortened += sum(cut for _, cut in found)
            for i, (text, _) in zip(chosen, found):
                out[i] = text
        return out

    def _generated(
        self,
        requests: Sequence[Instance],
        on_done: OnDone,
        stop: tuple[str, ...],
        max_tokens: int,
        how: Sampling,
    ) -> list[tuple[str, bool]]:
        """The texts, and of which the prompt was shortened."""
        prompts = [self._fitting(request, max_tokens) for request in requests]
        completions = self.generator.generate(
            [text for text, _ in prompts],
            max_tokens=max_tokens,
            sampling=how,
            stop=stop,
            on_done=on_done,
            batch_size=self.scorer.batch_size,
        )
        return [(c.text, cut) for c, (_, cut) in zip(completions, prompts)]

    def _answered(
        self,
        kind: str,
        requests: Sequence[Instance],
        answer: Callable[[Sequence[Instance], OnDone], list[Any]],
    ) -> list[Any]:
        """What `answer` gives for each request; those that are known are not asked again."""
        keys = [_key(kind, request) for request in requests]
        waiting = [i for i, key in enumerate(keys) if key not in self._known]
        done = len(keys) - len(waiting)
        with progress("requests", len(keys), start=done, active=self._show) as count:
            most = GENERATED if kind == "generate" else READ
            for some in portions(waiting, self.scorer.batch_size, most):
                asked = [requests[i] for i in some]
                told = answer(asked, lambda n, before=done: count(before + n))
                for i, found in zip(some, told, strict=True):
                    self._known[keys[i]] = found
                    if self._on_answer:
                        self._on_answer({"request": keys[i], "answer": found})
                count(done := done + len(some))
        return [self._known[key] for key in keys]

    def _fitting(self, request: Instance, max_tokens: int) -> tuple[str, bool]:
        """The end of a prompt that leaves room for what is to be generated, and whether that is
        not all of it."""
        limit = self.scorer.model.config.max_length - max_tokens
        if limit < 1:
            raise UserError(
                f"a task generates {max_tokens} tokens, and the model takes"
                f" {self.scorer.model.config.max_length} (model.max_length), the prompt included"
            )
        tokenizer, prompt, (name,) = self.scorer.tokenizer, request.args[0], _names([request])
        try:
            ids = tokenizer.encode_prompt(prompt)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        if not len(ids):
            raise UserError(f"{name}: an empty prompt, and no token that begins a text")
        if len(ids) <= limit:
            return prompt, False
        own = tokenizer.encode(prompt)
        kept = limit - (len(ids) - len(own))
        while len(ids) > limit:  # of text that was cut, there may be other tokens
            prompt, kept = tokenizer.decode(own[len(own) - kept :]), kept - 1
            ids = tokenizer.encode_prompt(prompt)
        return prompt, True


def _names(requests: Sequence[Instance]) -> list[str]:
    """For messages; the numbers are those of the records."""
    return [f"task '{r.task_name}', doc_id {r.doc_id}" for r in requests]


def _key(kind: str, request: Instance) -> str:
    """Tells requests from one another."""
    return hashlib.sha256(json.dumps([kind, request.args], sort_keys=True).encode()).hexdigest()


def _settings(given: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
    """Stop strings, tokens and sampling, as a task's `generation_kwargs` say.

    Raises:
      UserError: they say something else as well.
    """
    given = dict(given)
    until = given.pop("until", None) or ()
    stop = tuple(s for s in ((until,) if isinstance(until, str) else until) if s)
    lengths = [given.pop(name, None) for name in _LENGTH_NAMES]
    max_tokens = next((int(n) for n in lengths if n is not None), _DEFAULT_TOKENS)
    draws = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if draws else 0.0))
    if draws is False:
        temperature = 0.0
    limits = {name: given.pop(name) for name in ("top_k", "top_p", "min_p") if name in given}
    if given:
        raise UserError(f"a task's generation_kwargs: {', '.join(given)}: not supported")
    return stop, max_tokens, Sampling(temperature, **{"top_k": 0} | limits)


def load_tasks(names: Sequence[str], folder: str | None = None) -> Any:
    """Tasks of the harness, with their data.

    Args:
      names: of tasks, groups or tags.
      folder: of task files (YAML) of one's own, which go before those that come with the harness.

    Raises:
      UserError: there is no such task, or it or its data cannot be read.
    """
    if not sys.stderr.isatty():
        import datasets

        datasets.disable_progress_bars()
    if folder is not None and not os.path.isdir(folder):
        raise UserError(f"--task_path: there is no folder '{folder}'")
    try:
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if set(names) - set(manager.all_tasks):  # reading all of the harness's takes seconds
            manager = TaskManager(include_path=folder)
    except Exception as e:  # whatever it raises, it is about the files
        raise UserError(
            f"--task_path: the tasks in '{folder}' cannot be read: {_said(e)}"
        ) from None
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"--task=lm_eval: no task '{name}'{hint} (--task_path names a folder of your own)"
            )
    try:
        tasks = manager.load(list(names))
    except Exception as e:
        raise UserError(
            f"--task=lm_eval: {', '.join(names)} cannot be loaded: {_said(e)}\n(the data of most"
            " tasks is downloaded when they are used first)"
        ) from None
    unsafe = [name for name, t in tasks["tasks"].items() if t.get_config("unsafe_code")]
    if unsafe:
        raise UserError(
            f"--task=lm_eval: {', '.join(unsafe)}: runs code that a model wrote, which is not done"
            " here"
        )
    return tasks


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def set_shots(tasks: Any, shots: int | None) -> None:
    """How many examples with their answers stand before each question; None: as the tasks say.

    Raises:
      UserError: a task says that it has none.
    """
    for name, task in tasks["tasks"].items():
        stated = task.get_config("num_fewshot")
        if shots and stated == 0:
            raise UserError(
                f"--shots={shots}: '{name}' is to be asked without examples (num_fewshot: 0): leave"
                " --shots out, or evaluate it by itself"
            )
        task.set_config("num_fewshot", (stated or 0) if shots is None else shots)
        task.set_fewshot_seed(_SHOTS_SEED)


def run(
    model: HarnessModel, tasks: Any, limit: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's results for `load_tasks`' tasks, and its record of each example.

    Args:
      limit: the first so many examples of each task; None: all.

    Raises:
      UserError: what a task asks of the model is not supported.
    """
    random.seed(0)  # tasks may draw; as the harness's own command does
    np.random.seed(_SHOTS_SEED)
    found = evaluate(model, tasks, limit=limit, bootstrap_iters=1000)
    names = ("results", "groups", "versions", "n-shot", "n-samples")
    result = {name: found[name] for name in names if name in found}
    if model.shortened:
        result["shortened"] = model.shortened
    samples = [{"task": name} | s for name, rows in found["samples"].items() for s in rows]
    return result, samples
