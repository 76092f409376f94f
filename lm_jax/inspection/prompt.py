"""From a text to the tokens that a model is looked at with."""

import numpy as np

from lm_jax.config import ModelConfig
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError
from lm_jax.generation.filling import encode_with_masks
from lm_jax.generation.prompts import as_questions
from lm_jax.generation.reading import check_ids

_MOST_WEIGHTS = 40_000_000  # of attention: a page of 53 MB


def encode(
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    continuation: str = "",
    special_tokens: bool = False,
    chat: str | None = None,
) -> tuple[np.ndarray, int]:
    """The ids of a prompt with the specials that belong to it, and of what follows it.

    A model that is not causal sees a whole text, in which [MASK] hides a token.

    Args:
      continuation: encoded by itself, as an answer is when it is learned.
      special_tokens: names of specials in the text are read as these tokens. Nothing is added to a
        prompt then.
      chat: the prompt is what a user says, to a model that was trained for this objective. A
        template that came with it reads names of specials too.

    Returns:
      int32 [T], and how many of them are the prompt.

    Raises:
      UserError: the model has no chat template, or continues no text.
    """
    for flag, value in (("chat", chat), ("continuation", continuation)):
        if value and not config.causal:
            raise UserError(f"--{flag}: this model fills in masked tokens, and continues no text")
    whole = tokenizer.encode_with_specials if special_tokens else tokenizer.encode
    if chat:
        ids = as_questions([prompt], tokenizer, chat)[0]
    elif special_tokens:
        ids = whole(prompt)
    elif config.causal:
        ids = tokenizer.encode_prompt(prompt)
    else:
        ids = encode_with_masks(tokenizer, prompt)
    return np.concatenate([ids, whole(continuation)]), len(ids)


def check(config: ModelConfig, tokenizer: Tokenizer, ids_T: np.ndarray, max_tokens: int) -> None:
    """
    Args:
      ids_T: a prompt and what follows it.

    Raises:
      UserError: they are none or too many, one is not the model's, or they would make a page too
        large for a browser.
    """
    check_ids(ids_T, config, tokenizer)
    tokens = len(ids_T)
    found = f"--prompt: it has {tokens} tokens, specials and --continuation included, and"
    if tokens > config.max_length:
        raise UserError(f"{found} the model takes at most {config.max_length}: shorten it")
    if tokens > max_tokens:
        raise UserError(f"{found} --max_tokens={max_tokens} is the limit: shorten it or raise that")
    if not tokens:
        raise UserError("--prompt: the tokenizer makes no token of it")
    weights = config.layers * config.heads * tokens**2
    if config.causal and not config.prefix_attention:
        weights //= 2
    if weights > _MOST_WEIGHTS:
        raise UserError(
            f"{found} {config.layers} layers of {config.heads} heads have {weights / 1e6:.0f}"
            f" million attention weights for so many; a page holds {_MOST_WEIGHTS / 1e6:.0f}"
            " million: shorten it"
        )
