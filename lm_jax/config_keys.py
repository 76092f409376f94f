"""The keys of a config: dotted names such as 'optimizer.learning_rate', and what they hold."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from lm_jax.config import Config


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields (dotted key, value, field) for every leaf of a config."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, f


def nearest_key(key: str) -> str | None:
    """The config key that `key` was most likely meant to be."""
    keys = [k for k, _, _ in walk(Config())]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if close:
        return close[0]
    # A right name in a wrong section: 'model.learning_rate' means 'optimizer.learning_rate'.
    leaf = difflib.get_close_matches(
        key.rpartition(".")[2], [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.75
    )
    return next((k for k in keys if leaf and k.rpartition(".")[2] == leaf[0]), None)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's annotated type."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def differences(old: Config, new: Config) -> list[str]:
    """Lines 'key: old -> new' for each field that must not change when a run is resumed."""
    before = {k: v for k, v, _ in walk(old)}
    return [
        f"{k}: {before[k]!r} -> {v!r}"
        for k, v, f in walk(new)
        if before[k] != v and not f.metadata.get("resumable")
    ]
