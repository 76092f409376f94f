"""Checks on a config that need neither data nor devices, and the values it leaves to be derived."""

import math
from collections.abc import Iterator

from lm_jax.config import LEAST_MASKED_LENGTH, OBJECTIVES_OF, OF_EXAMPLES, Config, walk
from lm_jax.errors import UserError
from lm_jax.model_validation import Check, derive_model, mistakes, model_checks
from lm_jax.template import Template


def validate(config: Config) -> Config:
    """Checks `config`, fills in its derived fields, and returns it.

    Raises:
      UserError: a line for each field that is wrong, with its key.
    """
    if wrong := mistakes(config) or _mistakes(config):
        raise UserError("the config is not usable:\n  " + "\n  ".join(wrong))
    return config


def _mistakes(config: Config) -> list[str]:
    derive_model(config.model)
    _derive(config)
    return [f"{key}: {why}" for ok, key, why in _checks(config) if not ok]


def _derive(config: Config) -> None:
    data, training = config.data, config.training
    if data.objective == "classify":
        data.label_token = data.label_token or ("last" if config.model.causal else "first")
        if config.model.head == "classify" and not config.model.labels:
            config.model.labels = len(data.labels)
    if data.lanes is None and data.batch_size > 0:
        # Hosts share them out: a large batch is one for many hosts.
        most = max(16, data.batch_size // 4)
        data.lanes = max(n for n in range(1, most + 1) if data.batch_size % n == 0)
    if training.evaluate_batch_size is None:
        training.evaluate_batch_size = data.batch_size // max(1, training.accumulation)


def _checks(config: Config) -> Iterator[Check]:
    """Yields (holds, key, what to do) in an order in which earlier ones make later ones safe."""
    model, data, optimizer = config.model, config.data, config.optimizer
    training, mesh = config.training, config.mesh
    wrong = [check for check in model_checks(model) if not check[0]]
    yield from wrong
    positive = {
        "tokenizer.vocab_size": config.tokenizer.vocab_size,
        "tokenizer.train_bytes": config.tokenizer.train_bytes,
        "data.length": data.length,
        "data.batch_size": data.batch_size,
        "data.packing_bins": data.packing_bins,
        "data.lanes": data.lanes,
        "training.accumulation": training.accumulation,
        "training.evaluate_batch_size": training.evaluate_batch_size,
        "task.rows": config.task.rows,
        "task.beams": config.task.beams,
        "logging.every": config.logging.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, value in positive.items():
        yield (value or 0) > 0, key, f"must be at least 1, not {value}"
    if any((value or 0) <= 0 for value in positive.values()):
        return
    for key, value, _ in walk(config):
        if isinstance(value, float) and not key.startswith("model."):
            yield math.isfinite(value), key, f"must be a finite number, not {value}"

    yield (
        data.length <= model.max_length,
        "data.length",
        f"{data.length} tokens a row, but model.max_length = {model.max_length}",
    )
    masked = data.objective == "masked"
    if training.steps:
        yield from _check_objective(config)
    yield from _check_examples(config)
    yield from _check_task(config)
    yield 0 < data.mask_rate < 1, "data.mask_rate", f"must be in (0, 1), not {data.mask_rate}"
    yield (
        masked or not data.mask_whole_words,
        "data.mask_whole_words",
        "nothing is masked unless data.objective is 'masked'",
    )
    yield (
        not masked or data.length >= LEAST_MASKED_LENGTH,
        "data.length",
        f"masked rows have {LEAST_MASKED_LENGTH} tokens or more, not {data.length}",
    )
    yield (
        not masked or not training.sample_tokens or bool(training.sample_prompt),
        "training.sample_prompt",
        "a masked model fills in tokens of it: give a text, or set training.sample_tokens=0",
    )
    yield training.steps >= 0, "training.steps", f"must be at least 0, not {training.steps}"
    yield (
        bool(data.sources) or training.steps == 0,
        "data.sources",
        "name at least one file, folder, glob or data set",
    )
    yield (
        not data.weights or len(data.weights) == len(data.sources),
        "data.weights",
        f"{len(data.weights)} weights for {len(data.sources)} sources",
    )
    yield all(w > 0 for w in data.weights), "data.weights", "each must be above 0"
    yield (
        not data.weights or data.epochs is None,
        "data.epochs",
        "a weighted mixture has no epochs: drop data.weights, or set training.steps instead",
    )
    yield (
        not data.weights or data.packing != "crop",
        "data.weights",
        "packing 'crop' draws from all text alike: drop the weights or pack otherwise",
    )
    yield data.epochs is None or data.epochs > 0, "data.epochs", "must be at least 1"
    yield (
        data.packing != "crop" or data.epochs is None,
        "data.epochs",
        "packing 'crop' draws at random and has no epochs: set training.steps instead",
    )
    yield (
        data.packing != "crop" or (data.shuffle and not data.workers),
        "data.packing",
        "'crop' draws at random from memory: leave data.shuffle on and data.workers at 0",
    )
    yield (
        0 < data.validation_fraction <= 0.5,
        "data.validation_fraction",
        f"must be above 0 and at most 0.5, not {data.validation_fraction}",
    )
    yield training.seed >= 0, "training.seed", f"must be at least 0, not {training.seed}"
    yield (
        training.evaluate_batches is None or training.evaluate_batches > 0,
        "training.evaluate_batches",
        "must be at least 1; training.evaluate_every=0 turns evaluation off",
    )
    yield (
        data.batch_size % data.lanes == 0,
        "data.lanes",
        f"{data.lanes} does not divide data.batch_size = {data.batch_size}",
    )
    yield data.workers >= 0, "data.workers", f"must be at least 0, not {data.workers}"
    yield (
        data.workers == 0 or data.lanes % data.workers == 0,
        "data.workers",
        f"{data.workers} does not divide data.lanes = {data.lanes}",
    )
    yield (
        config.tokenizer.kind != "file" or bool(config.tokenizer.path) or bool(config.init_from),
        "tokenizer.path",
        "kind 'file' needs the path of a tokenizer",
    )
    yield (
        data.batch_size % training.accumulation == 0,
        "training.accumulation",
        f"{training.accumulation} does not divide data.batch_size = {data.batch_size}",
    )
    yield (
        training.loss_chunk is None
        or (training.loss_chunk > 0 and data.predictions % training.loss_chunk == 0),
        "training.loss_chunk",
        f"{training.loss_chunk} does not divide "
        + (
            f"the {data.predictions} predictions of a row"
            if masked
            else f"data.length = {data.length}"
        ),
    )
    above_0 = "optimizer.learning_rate optimizer.muon_learning_rate optimizer.epsilon"
    above_0 += " optimizer.decay_steps checkpoint.keep_every task.max_tokens task.examples"
    from_0 = "optimizer.clip_norm optimizer.warmup_steps optimizer.weight_decay training.z_loss"
    from_0 += " training.evaluate_every training.sample_every training.sample_tokens"
    from_0 += " task.every checkpoint.every training.balance_loss training.router_z_loss"
    parts = "optimizer.b1 optimizer.b2 optimizer.muon_momentum"
    for key, value, _ in walk(config):
        if value is not None and key in above_0.split():
            yield value > 0, key, f"must be above 0, not {value}"
        elif key in from_0.split():
            yield value >= 0, key, f"must be at least 0, not {value}"
        elif key in parts.split():
            yield 0 <= value < 1, key, f"must be in [0, 1), not {value}"
    yield (
        0 < optimizer.layer_decay <= 1,
        "optimizer.layer_decay",
        f"must be above 0 and at most 1 (1: all layers alike), not {optimizer.layer_decay}",
    )
    yield all(optimizer.freeze), "optimizer.freeze", "an empty pattern matches nothing"
    yield (
        not model.lora.rank or bool(config.init_from),
        "model.lora.rank",
        "adapters need weights that they belong to: name them with init_from",
    )
    for key in ("balance_loss", "router_z_loss"):
        yield (
            not getattr(training, key) or model.moe.experts > 0,
            f"training.{key}",
            "this model has no router (model.moe.experts = 0): set it to 0",
        )
    yield 0 <= optimizer.final_fraction <= 1, "optimizer.final_fraction", "must be in [0, 1]"
    axes = (mesh.data, mesh.fsdp, mesh.tensor, mesh.sequence, mesh.expert)
    yield (
        all(n == -1 or n > 0 for n in axes) and axes.count(-1) <= 1,
        "mesh",
        f"data, fsdp, tensor, sequence, expert = {axes}: each at least 1, and at most one of them"
        " -1 (data is, unless you set it: mesh.data=1)",
    )
    if model.prefix_attention:
        yield (
            mesh.sequence == 1,
            "mesh.sequence",
            f"rows of a model with model.prefix_attention stay whole: must be 1, not"
            f" {mesh.sequence}",
        )
        yield (
            not data.attend_across_documents,
            "data.attend_across_documents",
            "a prefix is one document's (model.prefix_attention): set it to False",
        )
    profile = config.logging.profile_steps
    yield (
        len(profile) == 0 or (len(profile) == 2 and 0 < profile[0] <= profile[1]),
        "logging.profile_steps",
        f"must be (first, last), not {profile}",
    )


_LEAST_WINDOW = 32  # tokens
# Objective -> the head that it trains, and whether the model must be causal; None: either way.
_NEEDS = {
    "next_token": ("linear", True),
    "complete": ("linear", True),
    "chat": ("linear", True),
    "masked": ("masked_lm", False),
    "classify": ("classify", None),
    "extract": ("span", False),
}


def _check_objective(config: Config) -> Iterator[Check]:
    """Whether the model can learn what the data asks for."""
    model, objective = config.model, config.data.objective
    head, causal = _NEEDS[objective]
    if config.init_from:  # the model is given: it is the objective that can be changed
        fits = "next_token', 'complete' or 'chat" if model.causal else "masked"
        yield (
            model.head != "none",
            "init_from",
            f"its model has no head that a loss could be computed of (model.head = '{model.head}'):"
            " take one with its language-model head; this one gives vectors (lm_jax.embed), and can"
            " learn to classify, and to extract answers",
        )
        if model.head in ("linear", "masked_lm"):
            yield (model.head == head, "data.objective", f"must be '{fits}' for this model")
        else:
            yield (
                model.head == head,
                "data.objective",
                f"'{objective}' does not fit a model with a head '{model.head}'",
            )
        return
    yield (
        causal in (None, model.causal),
        "model.causal",
        f"must be False for data.objective '{objective}', whose tokens are told by both sides"
        if causal is False
        else f"must be True for data.objective '{objective}': no token may see the next",
    )
    yield (
        model.head == head,
        "model.head",
        f"must be '{head}' for data.objective '{objective}', not '{model.head}'",
    )


def _check_examples(config: Config) -> Iterator[Check]:
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
        classify or not data.labels,
        "data.labels",
        f"objective '{data.objective}' has no classes: leave it out",
    )
    yield (
        classify or data.label_token is None,
        "data.label_token",
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
            not model.causal or data.label_token == "last",
            "data.label_token",
            "of a causal model only the last token has seen the text: 'last'",
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
        config.mesh.sequence == 1,
        "mesh.sequence",
        f"windows stay whole where answers are looked for: must be 1, not {config.mesh.sequence}",
    )


def _check_task(config: Config) -> Iterator[Check]:
    task, objective = config.task, config.data.objective
    wanted = OBJECTIVES_OF.get(task.name, ())
    yield (
        task.name == "none" or objective in wanted,
        "task.name",
        f"'{task.name}' is about examples of objective {' or '.join(map(repr, wanted))}, not"
        f" '{objective}'",
    )
    if task.name == "none":
        for key in ("metrics", "every", "keep_best"):
            yield not getattr(task, key), f"task.{key}", "there is no task: set task.name as well"
