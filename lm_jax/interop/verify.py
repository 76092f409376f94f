"""The same token ids through our model and through Transformers: the largest difference."""

import dataclasses
import importlib
import json
import os
from typing import Any

import jax
import numpy as np

from lm_jax.errors import UserError
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import activation_spec, reshard, shards

_ROWS, _LENGTH = 2, 64
# Of the spread of the values, by the dtype of the weights: what rounding them explains.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """
    Attributes:
      largest: absolute difference of two logits, or hidden states of a model without a head.
      spread: the standard deviation of Transformers' own.
      same_choice: share of positions at which the most probable token, or class, is the same; of a
        classifier each row has one.
    """

    largest: float
    spread: float
    same_choice: float

    def agree(self, dtype: str = "float32") -> bool:
        """Whether rounding the weights to `dtype` explains the difference."""
        return self.largest <= TOLERANCE[dtype] * max(1.0, self.spread)

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2e} (their standard deviation is"
            f" {self.spread:.2f}); the best is the same at {self.same_choice:.1%} of positions"
        )


def compare(model: Transformer, folder: str) -> Comparison:
    """Runs `model`, on the mesh that is set, and the folder's in Transformers, both in float32.

    Raises:
      UserError: Transformers or PyTorch is not installed, or cannot load the folder.
    """
    theirs = _load(folder)
    length = min(_LENGTH, model.config.max_length)
    rows = _ROWS * shards("batch")
    ids_BT = np.random.default_rng(0).integers(
        0, model.config.vocab_size, (rows, length), dtype=np.int32
    )
    if model.config.head == "classify":  # whatever ends a row must count as a token of it
        if (pad := theirs.config.pad_token_id) is not None:
            ids_BT[ids_BT == pad] = (pad + 1) % model.config.vocab_size
        want = np.concatenate([_reference(theirs, ids_BT[i : i + 1]) for i in range(rows)])
    else:
        want = _reference(theirs, ids_BT)
    c = model.config

    @jax.jit
    def outputs(model: Transformer, ids_BT: jax.Array) -> jax.Array:
        x_BTD, _ = model(reshard(ids_BT, activation_spec("batch", None)))
        if c.head == "classify":
            return model.logits(x_BTD[:, -1:] if c.causal else x_BTD[:, :1])[:, 0]
        return x_BTD if c.head == "none" else model.logits(x_BTD)

    with jax.default_matmul_precision("highest"):  # GPUs and TPUs would round the factors
        got = np.asarray(outputs(model, ids_BT), np.float32)
    return Comparison(
        largest=float(np.abs(got - want).max()),
        spread=float(want.std()),
        same_choice=float(np.mean(got.argmax(-1) == want.argmax(-1))),
    )


def _load(folder: str) -> Any:
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
    except ImportError as e:
        raise UserError(
            f"--verify compares with Transformers, and '{e.name}' is not installed: pip install"
            " torch transformers"
        ) from None
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        name = (json.load(f).get("architectures") or ["AutoModelForCausalLM"])[0]
    try:
        return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as e:  # whatever it raises, it is about the folder
        said = (str(e).strip().splitlines() or [repr(e)])[0]
        raise UserError(f"Transformers cannot load '{folder}': {said}") from None


def _reference(theirs: Any, ids_BT: np.ndarray) -> np.ndarray:
    torch = importlib.import_module("torch")
    with torch.no_grad():
        out = theirs(input_ids=torch.from_numpy(ids_BT.astype(np.int64)))
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()
