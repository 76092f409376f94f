"""Prompts from a file, and as questions to a model that chats."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm_jax import json_text
from lm_jax.data.chat import chat_template_for
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError


def read_prompts(path: str, *, key: str = "prompt", flag: str = "prompt_file") -> list[str]:
    """The prompts of a file, or texts of another use, in its order; blank lines are none.

    Args:
      path: '.jsonl': one JSON object a line, the prompt under `key`; else one prompt a line.

    Raises:
      UserError: it cannot be read or has no prompts; a line is not what it should be.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        raise UserError(f"--{flag}: cannot read '{path}': {e.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: not UTF-8, at byte {e.start + 1} of the line") from None
        if text.strip():
            prompts.append(_from_json(text, where, key) if path.endswith(".jsonl") else text)
    if not prompts:
        raise UserError(f"--{flag}: there is no text in '{path}'")
    return prompts


def as_questions(texts: Sequence[str], tokenizer: Tokenizer, objective: str) -> list[np.ndarray]:
    """What a model continues to answer each of the texts, said by a user: int32 [n] each.

    Args:
      objective: that the model was trained for.

    Raises:
      UserError: it has no chat template, or that does not take a text.
    """
    template = chat_template_for(tokenizer, objective)
    if template is None:
        raise UserError("--chat: this model has no chat template: leave it out, to continue text")
    return [template.encode(tokenizer, [{"role": "user", "content": x}], True) for x in texts]


def _from_json(line: str, where: str, key: str) -> str:
    try:
        record = json_text.loads(line)
    except json_text.JsonError as e:
        raise UserError(f"{where}: not JSON: {e}") from None
    if not isinstance(record, dict) or key not in record:
        raise UserError(f"{where}: expected an object with the key '{key}'")
    if not isinstance(record[key], str):
        raise UserError(f"{where}: '{key}' must be text, not {type(record[key]).__name__}")
    return record[key]
