"""A recipe as far as a plan needs it: without its text and without its tokenizer."""

import copy
import os
from collections.abc import Collection

import numpy as np

from lm_jax.config import Config
from lm_jax.data.tokenizer import Tokenizer, load_tokenizer
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError
from lm_jax.training import weights
from lm_jax.training.masking import Masking, make_masking
from lm_jax.training.workdir import rounded_vocabulary, with_vocabulary

_NO_WORKDIR = os.path.join(os.devnull, "none")  # nothing can be there
_ANY_SOURCE = ("python:",)
_SPECIALS = 4  # ids that a tokenizer trained for masks reserves: unknown, bos, eos, mask


def resolve(config: Config, overridden: Collection[str] = ()) -> tuple[Config, Masking | None]:
    """The config with every field filled in, the vocabulary included, and its masking.

    The text may be missing; weights that are named must be there, as their config.json has the
    model's shape.

    Args:
      overridden: keys that the command line set.

    Raises:
      UserError: the config is not usable, or the vocabulary is known only once the text is.
    """
    config = copy.deepcopy(config)
    config.data.sources = config.data.sources or _ANY_SOURCE
    config = weights.resolved(config, _NO_WORKDIR, overridden)
    tokenizer = _tokenizer(config)
    if tokenizer is not None:
        config = with_vocabulary(config, tokenizer)
        return config, make_masking(config.data, tokenizer, config.model.vocab_size)
    if config.model.vocab_size is None:
        if config.tokenizer.kind != "sentencepiece":
            raise UserError(
                f"the vocabulary of tokenizer.kind '{config.tokenizer.kind}' is known once it has"
                " read the text: say how large it is, with --config.model.vocab_size=100, say"
            )
        config.model.vocab_size = rounded_vocabulary(config.tokenizer.vocab_size)
    return config, _masking(config)


def _tokenizer(config: Config) -> Tokenizer | None:
    """The run's tokenizer, where there is one before there is text."""
    kind, masked = config.tokenizer.kind, config.data.objective == "masked"
    if kind == "bytes":
        return BytesTokenizer(masked)
    if kind == "file" and not config.init_from:
        return load_tokenizer(config.tokenizer.path)
    return None


def _masking(config: Config) -> Masking | None:
    """Computes as the run's masking will; which ids are special changes no shape."""
    data, size = config.data, config.model.vocab_size
    if data.objective != "masked":
        return None
    special_V = np.arange(size) < _SPECIALS
    starts_word_V = ~special_V if data.mask_whole_words else None
    return Masking(data.mask_rate, data.predictions, _SPECIALS - 1, special_V, starts_word_V)
