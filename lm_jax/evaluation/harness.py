"""Standard tasks, as lm-evaluation-harness has them (Gao et al. 2021), of a model here.

Needs the extra: pip install 'lm_jax[lm_eval]'. It is asked for at the top of this file, so import
this file only where such a task is asked for.
"""

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lm_jax.errors import UserError
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.generation.scoring import Scorer

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
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """Answers the harness's three kinds of requests, all that it has of a kind at once."""

    def __init__(self, scorer: Scorer, on_done: Callable[[int], None] | None = None):
        """
        Args:
          scorer: of a causal model.
          on_done: called with the number of requests done, of all kinds.

        Raises:
          UserError: the model is not causal.
        """
        super().__init__()
        self.scorer, self.generator = scorer, Generator(scorer.model, scorer.tokenizer)
        self._on_done, self._done = on_done, 0
        self.shortened = 0  # texts whose beginning did not fit into the model

    def loglikelihood(self, requests: Sequence[Instance], **_: Any) -> list[tuple[float, bool]]:
        """(log p, whether greedy) of each (context, continuation)."""
        found = self.scorer.loglikelihood([r.args for r in requests], self._counter())
        self._end(requests)
        self.shortened += sum(f.cut > 0 for f in found)
        return [(f.log_p, f.greedy) for f in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance], **_: Any) -> list[float]:
        """log p of each whole text."""
        # Windows are counted there, and texts here.
        found = self.scorer.loglikelihood_rolling([r.args[0] for r in requests])
        self._end(requests)
        return [f.log_p for f in found]

    def generate_until(self, requests: Sequence[Instance], **_: Any) -> list[str]:
        """What follows each context, up to one of the strings that the task stops at."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(i)
        out = [""] * len(requests)
        for (stop, max_tokens, sampling), chosen in groups.items():
            prompts = [self._fitting(requests[i].args[0], max_tokens) for i in chosen]
            completions = self.generator.generate(
                prompts,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                on_done=self._counter(),
                batch_size=self.scorer.batch_size,
            )
            self._end(chosen)
            for i, completion in zip(chosen, completions):
                out[i] = completion.text
        return out

    def _fitting(self, prompt: str, max_tokens: int) -> str:
        """The end of a prompt that leaves room for what is to be generated."""
        limit = self.scorer.model.config.max_length - max_tokens
        if limit < 1:
            raise UserError(
                f"a task generates {max_tokens} tokens, and the model takes"
                f" {self.scorer.model.config.max_length} (model.max_length), the prompt included"
            )
        tokenizer = self.scorer.tokenizer
        ids = tokenizer.encode_prompt(prompt)
        if len(ids) <= limit:
            return prompt
        self.shortened += 1
        own = tokenizer.encode(prompt)
        kept = limit - (len(ids) - len(own))
        while len(ids) > limit:  # of text that was cut, there may be other tokens
            prompt, kept = tokenizer.decode(own[len(own) - kept :]), kept - 1
            ids = tokenizer.encode_prompt(prompt)
        return prompt

    def _counter(self) -> Callable[[int], None] | None:
        before, on_done = self._done, self._on_done
        return None if on_done is None else lambda done: on_done(before + done)

    def _end(self, requests: Sequence[Any]) -> None:
        self._done += len(requests)
        if self._on_done is not None:
            self._on_done(self._done)


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


def run(
    scorer: Scorer, tasks: Any, on_done: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's results for `load_tasks`' tasks, and its record of each example.

    Raises:
      UserError: the model is not causal, or what a task asks of it is not supported.
    """
    model = HarnessModel(scorer, on_done)
    found = evaluate(model, tasks, bootstrap_iters=1000)
    names = ("results", "groups", "versions", "n-shot", "n-samples")
    result = {name: found[name] for name in names if name in found}
    if model.shortened:
        result["shortened"] = model.shortened
    samples = [{"task": name} | s for name, rows in found["samples"].items() for s in rows]
    return result, samples
