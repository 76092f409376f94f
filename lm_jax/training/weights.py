"""Where weights come from: the workdir of a run, or a Hugging Face folder.

The one place that knows: for a run that starts from them (`init_from`), for adapters, which are
saved without the weights they belong to, and for inference.
"""

import copy
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection

import jax
from jax.sharding import Mesh

from lm_jax import json_text, paths
from lm_jax.config import NOT_OF_THE_WEIGHTS, OWN_HEADS, Config, ModelConfig, TokenizerConfig
from lm_jax.config_keys import walk
from lm_jax.data.tokenizer import Tokenizer, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.interop import pretrained
from lm_jax.model import lora
from lm_jax.model import parameters as params_lib
from lm_jax.model.parameters import Parameters
from lm_jax.model.transformer import skeleton_of
from lm_jax.training.checkpoint import Checkpoints, abstract_parameters
from lm_jax.training.published import data_of
from lm_jax.training.workdir import read_config, with_vocabulary
from lm_jax.validation import validate

_PIN = "base.json"  # in the workdir of a run with adapters: whose they are


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that lie somewhere."""

    path: str
    step: int | None  # of a run; None: a Hugging Face folder

    def __str__(self) -> str:
        return self.path if self.step is None else f"{self.path}, step {self.step}"


def find(path: str, step: int | None = None) -> Source:
    """The weights at `path`.

    Args:
      step: which checkpoint of a run; None: the newest.

    Raises:
      UserError: there are none.
    """
    if step is not None and not _is_run(path):
        raise UserError(f"'{path}' is no run, so it has no checkpoint of step {step}")
    if _is_run(path):
        read_config(path)  # says so if it is none after all
        with Checkpoints(path) as checkpoints:
            return Source(path, checkpoints.choose(step))
    return Source(_pretrained(path), None)


def _is_run(path: str) -> bool:
    if paths.isdir(os.path.join(path, "checkpoints")):
        return True
    try:
        values = json_text.loads(paths.read_bytes(os.path.join(path, "config.json")))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"model", "data", "training"} <= values.keys()


def _pretrained(path: str) -> str:
    """The folder of a published model; one in a bucket is copied, as it is read in parts."""
    path = paths.local_copy(path)
    if not os.path.isdir(path):
        hint = (
            "; nothing is downloaded: fetch it first"
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)
            else ""
        )
        raise UserError(f"there is no folder '{path}'{hint}")
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        raise UserError(
            f"'{path}' holds adapters alone: use the workdir that they were trained in, or the"
            " merged model (python -m lm_jax.convert)"
        )
    if not pretrained.is_pretrained(path):
        raise UserError(
            f"'{path}' is neither the workdir of a run nor a Hugging Face folder: both"
            " have a config.json, with the sections of a run or with 'model_type'"
        )
    return path


def model_of(path: str) -> ModelConfig:
    """The model whose weights lie at `path`, adapters merged.

    Raises:
      UserError: there are none.
    """
    if not _is_run(path):
        return pretrained.read_model_config(_pretrained(path))
    return lora.base_config(_config_of_run(path)[0].model)


def _config_of_run(workdir: str) -> tuple[Config, Tokenizer]:
    """A run's config with every field filled in, and its tokenizer."""
    config = validate(read_config(workdir))
    tokenizer = load_tokenizer(os.path.join(workdir, "tokenizer"))
    return with_vocabulary(config, tokenizer), tokenizer


def resolved(config: Config, workdir: str, overridden: Collection[str] = ()) -> Config:
    """`config`, validated, with the model and the tokenizer that come with its weights.

    A run that is there already has them in its own config: without adapters, nothing of `init_from`
    is needed to go on.

    Args:
      overridden: keys that the command line set.

    Raises:
      UserError: there are no such weights, a key was set that comes with them, or the config is not
        usable.
    """
    config, path = copy.deepcopy(config), config.init_from
    classify = config.data.objective == "classify"
    if config.model.quantize != "none":
        raise UserError(
            "model.quantize: weights of eight bits do not learn. Leave it out, and give --quantize"
            " where the model is used"
        )
    if not path:
        return validate(config)
    if paths.exists(os.path.join(workdir, "config.json")):
        before = read_config(workdir)
        model, tokenizer, labels = before.model, before.tokenizer, before.data.labels
    else:
        try:
            model, tokenizer = model_of(path), TokenizerConfig(kind="file", path=path)
            labels = _classes_of(path) if classify else ()
            _check_order(path, labels, config.data.labels)
            if _is_run(path):
                tokenizer = read_config(path).tokenizer
        except UserError as e:
            raise UserError(f"init_from: {e}") from None
    asked = {key: value for key, value, _ in walk(config) if key in overridden}
    kept = {name: getattr(config.model, name) for name in NOT_OF_THE_WEIGHTS}
    config.model = dataclasses.replace(copy.deepcopy(model), **kept)
    own = OWN_HEADS.get(config.data.objective)
    if own and config.model.head != own:
        # Drawn anew, in place of the head that comes with the weights.
        config.model.head, config.model.tied_head, config.model.labels = own, True, 0
        config.model.pooler = bool(asked.get("model.pooler", config.model.pooler))
    if classify:
        config.data.labels = config.data.labels or labels
        config.model.labels = len(config.data.labels)
    config.tokenizer = copy.deepcopy(tokenizer)
    config = validate(config)
    wrong = [
        f"{key}: comes with the weights of {path} ({value!r}): leave it out"
        for key, value, _ in walk(config)
        if key.startswith(("model.", "tokenizer.")) and asked.get(key) not in (None, value)
    ]
    if wrong:
        raise UserError("the config is not usable:\n  " + "\n  ".join(wrong))
    return config


def _classes_of(path: str) -> tuple[str, ...]:
    """The names of the classes that the model at `path` tells apart; () if it does not."""
    if _is_run(path):
        return read_config(path).data.labels
    classes = pretrained.read_classes(_pretrained(path))
    return () if classes is None else classes.names


def _check_order(path: str, theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    """Under other names a head may go on with other classes; the same must be where they were.

    Raises:
      UserError: they are not.
    """
    before, now = ([name.casefold() for name in names] for names in (theirs, ours))
    if before != now and sorted(before) == sorted(now):
        raise UserError(
            f"data.labels = {ours}, but the head of {path} tells them apart in another order:"
            f" {theirs}. Leave data.labels empty to take that"
        )


def load_weights(
    source: Source,
    config: ModelConfig,
    mesh: Mesh,
    each: Callable[[str, jax.Array], Parameters] = params_lib.unchanged,
) -> Parameters:
    """All parameters, on the mesh; those of a run with adapters are the sums with its base.

    Args:
      config: as `model_of` gives it.
      each: see `pretrained.load_parameters`; a run's are all read before.

    Raises:
      UserError: they are damaged or of another model, or those the adapters belong to have gone.
    """
    if source.step is None:
        return pretrained.load_parameters(source.path, config, mesh, each)
    adapted = dataclasses.replace(config, lora=read_config(source.path).model.lora)
    parameters = load_saved(source, adapted, mesh)
    with jax.set_mesh(mesh):
        if adapted.lora.rank:
            base = load_weights(pinned(source.path), config, mesh)
            parameters = lora.merge(adapted, base | parameters)[1]
        for name in list(parameters):
            parameters |= each(name, parameters.pop(name))
    return parameters


def load_start(source: Source, config: ModelConfig, mesh: Mesh) -> Parameters:
    """What a run of a model of `config` starts with: of the weights at `source` those that it has
    as well; a head of another kind, or of another number of classes, is not among them.

    Raises:
      UserError: as `load_weights`.
    """
    theirs = model_of(source.path)
    given = load_weights(source, theirs, mesh)
    if (theirs.head, theirs.labels) == (config.head, config.labels):
        return given
    own = params_lib.split(skeleton_of(config))
    heads = ("head", "head_bias")
    return {k: x for k, x in given.items() if k in own and k not in heads}


def load_saved(source: Source, config: ModelConfig, mesh: Mesh) -> Parameters:
    """What a run's checkpoint holds: of a `config` with adapters, them alone."""
    abstract = abstract_parameters(skeleton_of(config), mesh)
    with Checkpoints(source.path) as checkpoints:
        return checkpoints.restore_parameters(source.step, abstract, mesh)


def settings_of(source: Source) -> tuple[Config, Tokenizer]:
    """Config, without adapters, and tokenizer. A published model is a run of no step on no text."""
    if source.step is not None:
        config, tokenizer = _config_of_run(source.path)
        config.model = lora.base_config(config.model)
        return config, tokenizer
    config = Config(model=pretrained.read_model_config(source.path))
    config.tokenizer = TokenizerConfig(kind="file", path=source.path)
    config.training.steps = 0
    tokenizer = load_tokenizer(source.path)
    config.data = data_of(source.path, config.model, tokenizer)
    config.init_from = source.path
    return with_vocabulary(validate(config), tokenizer), tokenizer


# What adapters belong to.


def begun_with(
    config: Config, workdir: str, mesh: Mesh, begun: bool
) -> tuple[Source | None, Parameters]:
    """The weights that a run has from elsewhere, and whose they are; None and none of a run that
    has none, or has them in its checkpoints.

    Args:
      begun: whether it goes on from a checkpoint.

    Raises:
      UserError: as `load_weights`.
    """
    if not (config.model.lora.rank or (config.init_from and not begun)):
        return None, {}
    source = source_of(workdir, config)
    return source, load_start(source, lora.base_config(config.model), mesh)


def source_of(workdir: str, config: Config) -> Source:
    """What a run starts from: for adapters that are there already, the very same as before."""
    if paths.exists(os.path.join(workdir, _PIN)):
        return pinned(workdir)
    return find(config.init_from)


def pin(workdir: str, source: Source) -> None:
    """Notes in `workdir` which weights its adapters belong to."""
    path = paths.absolute(source.path)
    values = {"path": path, "step": source.step, "fingerprint": fingerprint(source)}
    try:
        paths.write_whole(os.path.join(workdir, _PIN), json.dumps(values, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written: {e.strerror}") from None


def pinned(workdir: str) -> Source:
    """The weights that the adapters of `workdir` belong to.

    Raises:
      UserError: they have gone, or are others than they were.
    """
    note = os.path.join(workdir, _PIN)
    try:
        values = json_text.loads(paths.read_bytes(note))
        source, wanted = Source(str(values["path"]), values["step"]), values["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{note} cannot be read ({type(e).__name__}): it says which weights the adapters in"
            f" '{workdir}' belong to"
        ) from None
    advice = f"put it back, or, if it was moved, say in {note} where it is now"
    try:
        found = fingerprint(find(source.path, source.step))
    except UserError as e:
        raise UserError(
            f"the adapters in '{workdir}' belong to the weights of {source}, which cannot be read:"
            f" {advice}\n{e}"
        ) from None
    if found != wanted:
        raise UserError(
            f"the adapters in '{workdir}' belong to the weights of {source}, and what lies there"
            f" now is not what it was when they were trained: {advice}"
        )
    return source


def fingerprint(source: Source) -> str:
    """Tells weights from others without reading all of them.

    Of a checkpoint: the names and sizes of its files, and what small ones hold. The names of those
    with the numbers are drawn at random by each save.
    """
    if source.step is None:
        return pretrained.fingerprint(source.path)
    digest = hashlib.sha256()
    folder = os.path.join(source.path, "checkpoints", str(source.step), "parameters")
    # Of each folder its files, then those of its folders.
    for name in sorted(sizes := paths.files_below(folder), key=_depth_first):
        digest.update(f"{name} {sizes[name]}\n".encode())
        if sizes[name] <= 65_536:
            digest.update(paths.read_bytes(os.path.join(folder, name)))
    if paths.exists(os.path.join(source.path, _PIN)):
        digest.update(paths.read_bytes(os.path.join(source.path, _PIN)))
    return digest.hexdigest()


def _depth_first(name: str) -> list[tuple[bool, str]]:
    *folders, last = name.split("/")
    return [*((True, folder) for folder in folders), (False, last)]
