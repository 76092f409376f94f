"""config.json to ModelConfig and back, by a family's maps."""

from typing import Any

from lm_jax import json_text
from lm_jax.config import NOT_OF_THE_WEIGHTS, ModelConfig, MoeConfig, RopeScaling
from lm_jax.config_keys import walk
from lm_jax.errors import UserError, cut, shown
from lm_jax.interop.family import Family, Json
from lm_jax.interop.labels import default_labels, read_labels, write_labels
from lm_jax.interop.registry import FAMILIES
from lm_jax.model.head import HEADS_WITHOUT_WORDS
from lm_jax.model_validation import validate_model

_MOST_LAYERS, _LARGEST = 10_000, 2**31 - 1
_LONGEST = 1000  # characters of what a family says of a value


def read_json(path: str) -> Json:
    """
    Raises:
      UserError: it is not there, or no JSON object.
    """
    try:
        with open(path, "rb") as f:
            values = json_text.loads(f.read())
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except json_text.JsonError as e:
        raise UserError(f"{path}: not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(values).__name__}")
    return values


def family_of(hf: Json, where: str) -> Family:
    """
    Raises:
      UserError: it is of an architecture that is not supported; the message lists those that are.
    """
    kind, classes = hf.get("model_type"), hf.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{where}: architectures must be a list of names, not {shown(classes)}")
    known = {name: f for f in FAMILIES.values() for name in f.architectures}
    if kind is None and classes:
        kind = known[classes[0]].model_type if classes[0] in known else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        said = (
            f"model_type {shown(kind)}" if kind is not None else f"architectures {shown(classes)}"
        )
        raise UserError(f"{where}: {said} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if classes and classes[0] in family.refused:
        raise UserError(
            f"{where}: architecture {classes[0]} is not supported: {family.refused[classes[0]]}"
        )
    if classes and classes[0] not in family.architectures:
        raise UserError(
            f"{where}: architecture {shown(classes[0])} is not supported; supported of {kind}:"
            f" {', '.join(family.architectures)}"
        )
    return family


def read_config(family: Family, hf: Json, where: str, names: set[str] | None = None) -> ModelConfig:
    """The model that config.json describes.

    Args:
      where: the file, for messages.
      names: of the tensors beside it, with the family's prefix; they decide the fields of
        `family.has`. None: those are left off.

    Raises:
      UserError: a key is missing, of a wrong type, or asks for a computation that is not supported.
    """
    for other, key in family.aliases.items():
        if other in hf and key in hf and hf[key] != hf[other]:
            raise UserError(f"{where}: {key} = {shown(hf[key])}, but {other} = {shown(hf[other])}")
        if other in hf:
            hf = hf | {key: hf[other]}
    hf = dict(family.defaults) | hf
    for key, wanted in family.only.items():
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        if key in hf and hf[key] not in wanted:
            raise UserError(
                f"{where}: {key} = {shown(hf[key])} is not supported, only {shown(wanted[0])}"
            )
    for key, ours in family.keys.items():
        limit = _MOST_LAYERS if ours == "layers" else _LARGEST
        if isinstance(hf.get(key), int) and not -limit <= hf[key] <= limit:
            raise UserError(f"{where}: {key} = {hf[key]} is beyond any model there is")
    classes = hf.get("architectures") or [next(iter(family.architectures))]
    fields: dict[str, Any] = dict(family.fixed) | {"family": family.model_type}
    fields["head"] = family.architectures[classes[0]]
    try:
        fields |= {ours: hf[theirs] for theirs, ours in family.keys.items()}
        fields |= family.read(hf)
    except KeyError as e:
        raise UserError(f"{where}: the key {cut(str(e), _LONGEST)} is missing") from None
    except UserError as e:
        raise UserError(f"{where}: {cut(str(e), _LONGEST)}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(
            f"{where}: a value is not of the type it should be: {cut(str(e), _LONGEST)}"
        ) from None
    if fields["head"] in HEADS_WITHOUT_WORDS:
        fields["tied_head"] = True
    if fields["head"] == "classify":
        fields["labels"] = len(read_labels(hf, where))
    fields |= {ours: theirs in (names or ()) for ours, theirs in family.has.items()}
    fields |= family.by_head.get(fields["head"], {})
    if fields["vocab_size"] is None:
        raise UserError(f"{where}: vocab_size must be a whole number, not null")
    scaling = RopeScaling(**fields.pop("rope_scaling", {}))
    moe = MoeConfig(**fields.pop("moe", {}))
    return validate_model(ModelConfig(**fields, rope_scaling=scaling, moe=moe), where)


def write_config(family: Family, model: ModelConfig, labels: tuple[str, ...] = ()) -> Json:
    """config.json of `model` in `family`, without what belongs to the tokenizer.

    Args:
      labels: of a model with a head 'classify', the names of its classes; (): they have none.

    Raises:
      UserError: the family cannot express it; the message names each field.
    """
    hf = {theirs: getattr(model, ours) for theirs, ours in family.keys.items()}
    hf |= family.write(model)
    classes = [name for name, head in family.architectures.items() if head == model.head]
    if not classes:
        raise UserError(f"model.head: {family.model_type} has no model with head '{model.head}'")
    hf |= {"model_type": family.model_type, "architectures": classes[:1]}
    if model.head == "classify":
        hf |= write_labels(labels or default_labels(model.labels))
    names = {tensor for field, tensor in family.has.items() if getattr(model, field)}
    again = read_config(family, hf, family.model_type, names)
    before = {
        k: v for k, v, _ in walk(model) if k.split(".")[0] not in (*NOT_OF_THE_WEIGHTS, "family")
    }
    wrong = [
        f"model.{k} = {before[k]!r}, there {v!r}"
        for k, v, _ in walk(again)
        if k in before and before[k] != v
    ]
    if wrong:
        raise UserError(f"no {family.model_type} model has:\n  " + "\n  ".join(wrong))
    return hf


def choose_family(model: ModelConfig) -> Family:
    """The family that `model` was read from, or the first that expresses it.

    Raises:
      UserError: there is none; the message says what keeps the nearest from it.
    """
    if model.family:
        if model.family not in FAMILIES:
            raise UserError(
                f"model.family: '{model.family}' is none of {', '.join(FAMILIES)}, or ''"
            )
        return FAMILIES[model.family]
    failures = []
    for family in FAMILIES.values():
        try:
            write_config(family, model)
        except UserError as e:
            failures.append(str(e))
        else:
            return family
    # Another head, or no such model at all, is further than any number of fields.
    nearest = min(failures, key=lambda m: (not m.startswith("no "), m.count("\n")))
    raise UserError(
        "no family of published models has this shape, so it cannot be exported; nearest:"
        f" {nearest}"
    )
