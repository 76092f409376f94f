"""What a published model can be asked, as the data of a run of its own would say it."""

import dataclasses

import numpy as np

from lm_jax.applications import APPLICATIONS, EXTRACT
from lm_jax.config import DataConfig, ModelConfig
from lm_jax.data.encoding import with_ends_to_classify
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.errors import UserError
from lm_jax.interop import pretrained

_WINDOW = 384  # tokens that an answer is looked for in at a time, as BERT has it (Devlin et al.)


def data_of(path: str, model: ModelConfig, tokenizer: Tokenizer) -> DataConfig:
    """
    Args:
      path: of its Hugging Face folder.

    Raises:
      UserError: Transformers tells classes at another token than we do.
    """
    data = DataConfig(objective="next_token" if model.causal else "masked")
    data.length = min(data.length, model.max_length)
    if classes := pretrained.read_classes(path):
        data.objective, data.labels = "classify", classes.names
        data.pooling = "last" if model.causal else "first"
        words = APPLICATIONS["sentiment"]
        data.prompt, data.target = words.prompt, words.target
        end = _end_of(tokenizer) if model.causal else None
        if end is not None and end == classes.pad_id:
            raise UserError(
                f"{path}: its tokenizer ends a text with the id {classes.pad_id}, which is"
                " pad_token_id in config.json: Transformers tells the class at the token before,"
                " and lm_jax at the last"
            )
    if model.head == "span":
        data = dataclasses.replace(data, objective="extract", **EXTRACT)
        data.length = min(_WINDOW, data.length)
        data.stride = data.length // 3
    return data


def _end_of(tokenizer: Tokenizer) -> int | None:
    """The id that stands behind a text to classify, the last of several; None if there is none."""
    framed = with_ends_to_classify(tokenizer, np.array([-1], np.int32)).tolist()
    return framed[-1] if framed[-1] >= 0 else None


def padding_of(tokenizer: Tokenizer) -> int | None:
    """An id that never ends a text to classify, so that the last of all others is its last token,
    which is how Transformers finds it in a row; None if there is none."""
    unfit = (None, _end_of(tokenizer))
    fit = (tokenizer.pad_id, tokenizer.bos_id)
    return next((i for i in fit if i in tokenizer.specials and i not in unfit), None)
