"""What a sentence-transformers folder says of pooling."""

import os

from lm_jax import json_text
from lm_jax.errors import UserError, shown
from lm_jax.interop.config_map import read_json

_KINDS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
_MODES = {"mean": "mean", "cls": "first", "lasttoken": "last"}


def read_pooling(folder: str) -> dict[str, object]:
    """Fields of `lm_jax.generation.embedding.Pooling` by modules.json; {} where there is none.

    Raises:
      UserError: a file is damaged, or asks for what is not supported.
    """
    where = os.path.join(folder, "modules.json")
    if not os.path.exists(where):
        return {}
    try:
        with open(where, "rb") as f:
            found = json_text.loads(f.read())
        modules = [(m["type"].rpartition(".")[2], str(m["path"])) for m in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{where}: not the list of modules it should be: {e}") from None
    fields: dict[str, object] = {"normalize": False}
    for kind, path in modules:
        if ".." in path.split("/") or os.path.isabs(path) or "\0" in path:
            raise UserError(f"{where}: the path {path[:200]!r} leads out of the folder")
        if kind == "Normalize":
            fields["normalize"] = True
        elif kind == "Pooling":
            fields["kind"] = _pooling(os.path.join(folder, path, "config.json"))
        elif kind != "Transformer":
            raise UserError(f"{where}: a module of type {kind[:200]} is not supported")
    path = os.path.join(folder, "config_sentence_transformers.json")
    if os.path.exists(path) and (prompt := read_json(path).get("default_prompt_name")):
        raise UserError(f"{path}: default_prompt_name = {shown(prompt)} is not supported")
    path = os.path.join(folder, "sentence_bert_config.json")
    if os.path.exists(path):
        settings = read_json(path)
        if settings.get("do_lower_case"):
            raise UserError(f"{path}: do_lower_case = true is not supported")
        length = settings.get("max_seq_length")
        if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
            raise UserError(f"{path}: max_seq_length must be a whole number, not {shown(length)}")
        fields["max_tokens"] = length
    return fields


def _pooling(path: str) -> str:
    config = read_json(path)
    modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if isinstance(mode := config.get("pooling_mode"), str):
        modes = [mode]
    known = _KINDS | _MODES
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(f"{path}: pooling by {modes} is not supported; known: {', '.join(known)}")
    return known[modes[0]]
