"""Checks on what a config says of examples: templates, classes, windows and the task."""

from collections.abc import Iterator

from lm_jax.applications import APPLICATIONS
from lm_jax.config import OF_EXAMPLES, OWN_HEADS, Config, DataConfig, TaskConfig
from lm_jax.errors import UserError
from lm_jax.model_validation import Check
from lm_jax.template import Template

_LEAST_WINDOW = 32  # tokens


def example_checks(config: Config) -> Iterator[Check]:
    """Templates, labels, and what of the data is about running text alone."""
    model, data = config.model, config.data
    for key in ("prompt", "target"):
        text = getattr(data, key)
        if data.objective not in OF_EXAMPLES:
            yield not text, f"data.{key}", f"objective '{data.objective}' has none: leave it out"
            continue
        try:
            fields = Template(text, f"data.{key}").fields
        except UserError as e:
            yield False, f"data.{key}", str(e).removeprefix(f"data.{key}: ")
            continue
        if key == "target" and data.objective == "chat" and not text:
            continue
        wanted = "which field of a record it is made of, as in '{text}'"
        yield bool(fields), f"data.{key}", f"say {wanted}, not {text!r}"
        if key == "prompt" and data.objective == "chat" and not data.target:
            yield (
                text == "{" + fields[0] + "}" if fields else False,
                "data.prompt",
                "without data.target it names the field of a conversation, as in '{messages}', and"
                f" nothing else, not {text!r}",
            )
    classify, extract = data.objective == "classify", data.objective == "extract"
    if extract:
        yield from _check_windows(config)
    for key in ("context", "answer_starts"):
        yield (
            extract or not getattr(data, key),
            f"data.{key}",
            f"objective '{data.objective}' has none: leave it out",
        )
    yield (
        not data.unanswerable or (data.objective in OF_EXAMPLES and not classify and data.target),
        "data.unanswerable",
        f"objective '{data.objective}' has no answers by themselves: leave it out",
    )
    yield (
        classify or not data.labels,
        "data.labels",
        f"objective '{data.objective}' has no classes: leave it out",
    )
    yield (
        data.objective == "chat" or data.turns is None,
        "data.turns",
        f"objective '{data.objective}' has no conversations: leave it out",
    )
    yield (
        data.turns != "together" or not model.prefix_attention,
        "data.turns",
        "with model.prefix_attention an answer is given all before it both ways, and so has to be"
        " learned: 'apart'",
    )
    yield (
        classify or data.pooling is None,
        "data.pooling",
        f"objective '{data.objective}' has no classes: leave it out",
    )
    if data.objective not in OF_EXAMPLES:
        return
    for key, wanted in (("packing", "first_fit"), ("validation_split", "document")):
        yield (
            getattr(data, key) == wanted,
            f"data.{key}",
            f"must be '{wanted}' for examples, which are whole or not at all",
        )
    yield (
        not data.attend_across_documents,
        "data.attend_across_documents",
        "examples have nothing to do with one another: leave it False",
    )
    if classify or extract:
        yield (
            not model.lora.rank,
            "model.lora.rank",
            "adapters alone cannot learn this, as the head has to learn as well: set it to 0, and"
            " name what is to stay in optimizer.freeze",
        )
    if classify:
        yield (
            len(data.labels) >= 2 and len(set(data.labels)) == len(data.labels),
            "data.labels",
            f"name the classes, two or more, each once, not {data.labels}",
        )
        yield (
            model.head != "classify" or model.labels == len(data.labels),
            "model.labels",
            f"{model.labels} classes, but data.labels names {len(data.labels)}",
        )
        yield (
            not model.causal or data.pooling != "first",
            "data.pooling",
            "of a causal model the first token has seen nothing of the text: 'last' or 'mean'",
        )


def _check_windows(config: Config) -> Iterator[Check]:
    """What a context that holds an answer needs."""
    data = config.data
    try:
        fields = Template(data.context, "data.context").fields
        wanted = "which field of a record holds the answer's text, as in '{context}'"
        yield bool(fields), "data.context", f"say {wanted}, not {data.context!r}"
    except UserError as e:
        yield False, "data.context", str(e).removeprefix("data.context: ")
    yield (
        data.length >= _LEAST_WINDOW,
        "data.length",
        f"a question and a part of its context need {_LEAST_WINDOW} tokens, not {data.length}",
    )
    yield (
        0 <= data.stride <= data.length // 2,
        "data.stride",
        f"must be from 0 to half of data.length = {data.length}, not {data.stride}",
    )
    yield (
        not config.training.label_smoothing,
        "training.label_smoothing",
        "the tokens of a window are no candidates alike: set it to 0",
    )
    yield (
        config.mesh.sequence == 1,
        "mesh.sequence",
        f"windows stay whole where answers are looked for: must be 1, not {config.mesh.sequence}",
    )


def without_use(data: DataConfig, beams: int) -> dict[str, str]:
    """Fields of `TaskConfig` that would change nothing about answers, and why."""
    objective, unused = data.objective, {}
    if objective != "extract" or not data.unanswerable:
        unused["null_threshold"] = "each question has an answer, or there is nothing to compare"
    if beams == 1:
        unused["length_penalty"] = "there is one beam, and nothing to choose by it"
    if objective in OWN_HEADS:
        why = f"a model of objective '{objective}' writes no answers"
        unused |= dict.fromkeys(("beams", "length_penalty"), why)
    if objective == "classify":
        unused["max_tokens"] = why
    return unused


def task_checks(config: Config) -> Iterator[Check]:
    """Whether the task is one that the data is about."""
    task, objective = config.task, config.data.objective
    wanted = APPLICATIONS[task.name].objectives if task.name in APPLICATIONS else ()
    yield (
        task.name == "none" or objective in wanted,
        "task.name",
        f"'{task.name}' is about examples of objective {' or '.join(map(repr, wanted))}, not"
        f" '{objective}'",
    )
    for key, why in without_use(config.data, task.beams).items():
        yield getattr(task, key) == getattr(TaskConfig, key), f"task.{key}", f"{why}: leave it out"
    if task.name == "none":
        for key in ("metrics", "null_threshold", "every", "keep_best"):
            yield not getattr(task, key), f"task.{key}", "there is no task: set task.name as well"
