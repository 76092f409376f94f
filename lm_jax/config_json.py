"""A config as JSON and back."""

import dataclasses
import json
from typing import Any

from lm_jax import json_text
from lm_jax.config import Config
from lm_jax.config_keys import fits, nearest_key
from lm_jax.errors import UserError

_SHOWN = 200  # characters of a value in a message
_RENAMED = {"data.label_token": "pooling"}  # as older runs have it -> as it is called now


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str | bytes, where: str = "config.json") -> Config:
    """The config that `to_json` wrote.

    Raises:
      UserError: the text is no JSON, or names a key that this version does not have.
    """
    try:
        values = json_text.loads(text)
    except json_text.JsonError as e:
        line = f":{e.line}" if e.line else ""
        raise UserError(f"{where}{line}: not JSON: {e}") from None
    config = _from_dict(Config, values, where, "")
    # Before it was a choice, runs learned conversations so; with prefix attention none can go on.
    if config.data.objective == "chat" and not config.model.prefix_attention:
        config.data.turns = config.data.turns or "together"
    return config


def _from_dict(kind: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        shown = repr(values)[:_SHOWN]
        raise UserError(f"{where}: '{prefix.rstrip('.')}' must be a section, not {shown}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    out = kind()
    for name, value in values.items():
        name = _RENAMED.get(prefix + name, name)
        if name not in known:
            key = f"{prefix}{name}"[:_SHOWN].encode("utf-8", "replace").decode()
            hint = nearest_key(key)
            raise UserError(
                f"{where}: no config key '{key}'" + (f"; did you mean '{hint}'?" if hint else "")
            )
        current = getattr(out, name)
        if dataclasses.is_dataclass(current):
            value = _from_dict(type(current), value, where, f"{prefix}{name}.")
        else:
            value = tuple(value) if isinstance(value, list) else value
            wanted = known[name].type
            if not fits(value, wanted):
                wanted = wanted.__name__ if isinstance(wanted, type) else wanted
                raise UserError(
                    f"{where}: '{prefix}{name}' must be {wanted}, not {repr(value)[:_SHOWN]}"
                )
        setattr(out, name, value)
    return out
