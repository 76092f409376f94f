"""Checks on a config that need neither data nor devices, and the values it leaves to be derived."""

import math
from collections.abc import Iterator

from lm_jax.config import LEAST_MASKED_LENGTH, Config
from lm_jax.config_keys import walk
from lm_jax.errors import UserError
from lm_jax.example_validation import example_checks, task_checks
from lm_jax.model_validation import Check, derive_model, mistakes, model_checks

_MOST_ROWS = 2**31 - 1  # of a batch


def validate(config: Config) -> Config:
    """Checks `config`, fills in its derived fields, and returns it.

    Raises:
      UserError: a line for each field that is wrong, with its key.
    """
    if wrong := mistakes_in(config):
        raise UserError("the config is not usable:\n  " + "\n  ".join(wrong))
    return config


def mistakes_in(config: Config) -> list[str]:
    """A line for each field that is wrong, with its key; fills in the derived fields."""
    if wrong := mistakes(config):
        return wrong
    derive_model(config.model)
    _derive(config)
    return [f"{key}: {why}" for ok, key, why in _checks(config) if not ok]


def _derive(config: Config) -> None:
    data, training = config.data, config.training
    if data.objective == "classify":
        data.pooling = data.pooling or ("last" if config.model.causal else "first")
        if config.model.head == "classify" and not config.model.labels:
            config.model.labels = len(data.labels)
    if data.objective == "chat":
        data.turns = data.turns or ("apart" if config.model.prefix_attention else "together")
    if data.lanes is None and 0 < data.batch_size <= _MOST_ROWS:
        # Hosts share them out: a large batch is one for many hosts.
        rows, most = data.batch_size, max(16, data.batch_size // 4)
        small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
        data.lanes = max(n for n in (*small, *(rows // n for n in small)) if n <= most)
    if training.evaluate_batch_size is None:
        training.evaluate_batch_size = data.batch_size // max(1, training.accumulation)


def _checks(config: Config) -> Iterator[Check]:
    """Yields (holds, key, what to do) in an order in which earlier ones make later ones safe."""
    model, data, optimizer = config.model, config.data, config.optimizer
    training, mesh = config.training, config.mesh
    wrong = [check for check in model_checks(model) if not check[0]]
    yield from wrong
    if data.batch_size > _MOST_ROWS:
        yield False, "data.batch_size", f"must be at most {_MOST_ROWS:,}, not {data.batch_size}"
        return
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
    yield from example_checks(config)
    yield from task_checks(config)
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
    for key, least in (("skips", 1), ("spike", 0), ("spike_window", 1), ("rewinds", 0)):
        n = getattr(config.faults, key)
        yield n >= least, f"faults.{key}", f"must be at least {least}, not {n}"
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
        training.loss_chunk is None or training.loss_chunk > 0,
        "training.loss_chunk",
        f"must be at least 1, not {training.loss_chunk}",
    )
    above_0 = "optimizer.learning_rate optimizer.muon_learning_rate optimizer.epsilon"
    above_0 += " optimizer.decay_steps checkpoint.keep_every task.max_tokens task.examples"
    from_0 = "optimizer.clip_norm optimizer.warmup_steps optimizer.weight_decay training.z_loss"
    from_0 += " training.evaluate_every training.sample_every training.sample_tokens"
    from_0 += " training.hang_after"
    from_0 += " task.every checkpoint.every training.balance_loss training.router_z_loss"
    parts = "optimizer.b1 optimizer.b2 optimizer.muon_momentum training.label_smoothing"
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
