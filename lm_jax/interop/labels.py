"""The classes of a published classifier: 'id2label' of its config.json."""

from lm_jax.errors import UserError, shown
from lm_jax.interop.family import Json

_MOST = 100_000  # classes: beyond any classifier of texts there is
_KIND = "single_label_classification"  # one class of several, by softmax


def default_labels(count: int) -> tuple[str, ...]:
    """What Transformers calls classes that have no names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def read_labels(hf: Json, where: str) -> tuple[str, ...]:
    """The names of the classes, in order.

    Raises:
      UserError: it tells something else than one of two classes or more, or they have no names to
        tell them by.
    """
    kind = hf.get("problem_type")
    if kind not in (None, _KIND):
        raise UserError(
            f"{where}: problem_type = {shown(kind)} is not supported, only {_KIND!r}: a text is"
            " of one class, and its probabilities add up to 1"
        )
    count, given = hf.get("num_labels"), hf.get("id2label")
    if count is None:  # Transformers has two where nothing is said
        count = 2 if given is None else len(given) if isinstance(given, dict) else None
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST:
        raise UserError(
            f"{where}: num_labels = {shown(hf.get('num_labels'))} and id2label ="
            f" {str(given)[:60]} do not say how many classes there are"
        )
    if count == 1:
        raise UserError(
            f"{where}: one label is a regression, a number for each text, which is not supported:"
            " a classifier has two classes or more"
        )
    if given is None:
        return default_labels(count)
    try:
        names = {int(key): name for key, name in given.items()}
    except (AttributeError, TypeError, ValueError):
        names = {}
    if len(names) != count or names.keys() != set(range(count)):
        raise UserError(f"{where}: id2label must name the classes 0 to {count - 1}, each once")
    ordered = tuple(names[i] for i in range(count))
    if not all(isinstance(name, str) and name for name in ordered):
        raise UserError(f"{where}: id2label must give each class a name, and it is a text")
    if twice := sorted(name for name in set(ordered) if ordered.count(name) > 1)[:1]:
        raise UserError(
            f"{where}: id2label calls two classes {shown(twice[0])}: give them other names"
        )
    return ordered


def write_labels(labels: tuple[str, ...]) -> Json:
    return {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": _KIND,
    }
