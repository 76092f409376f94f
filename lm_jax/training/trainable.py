"""Which parameters learn, and how fast: one table of rates by name.

A rate multiplies the update that the optimizer gives, weight decay included; 0 is frozen. Stacked
parameters [L, ...] have one rate for all their layers or one a layer.
"""

import difflib
import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm_jax.config import Config, ModelConfig
from lm_jax.errors import UserError
from lm_jax.model.lora import is_adapter
from lm_jax.model.parameters import Parameters

Rates = dict[str, float | np.ndarray]

_STACKED = "blocks."
_POOLER = ("pooler", "pooler_bias")  # classifiers alone see them


def rates(shapes: dict[str, tuple[int, ...]], config: Config) -> Rates:
    """Name -> the learning rate's multiplier, a number or float32 [L].

    Args:
      shapes: name -> shape of all parameters of the model.

    Raises:
      UserError: a pattern of `optimizer.freeze` matches nothing, or nothing is left to train.
    """
    frozen = _frozen(shapes, config.optimizer.freeze)
    out: Rates = {}
    for name, shape in shapes.items():
        layers = shape[0] if name.startswith(_STACKED) else None
        rate = _decayed(name, layers, config) * (1.0 - frozen[name].astype(np.float32))
        if config.model.lora.rank and not is_adapter(name):
            rate = np.zeros_like(rate)
        if name in _POOLER and config.model.head != "classify":  # weight decay alone would move it
            rate = np.zeros_like(rate)
        out[name] = float(rate.flat[0]) if np.all(rate == rate.flat[0]) else rate
    if not any(np.any(rate) for rate in out.values()):
        raise UserError(
            f"optimizer.freeze = {config.optimizer.freeze} leaves nothing to train: each of the"
            f" {'adapters' if config.model.lora.rank else 'parameters'} matches a pattern"
        )
    return out


def _frozen(shapes: dict[str, tuple[int, ...]], patterns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Name -> whether a pattern matches it: bool [], or [L] for stacked parameters."""
    out = {
        name: np.zeros(shape[:1] if name.startswith(_STACKED) else (), bool)
        for name, shape in shapes.items()
    }
    for pattern in patterns:
        found = False
        for name, layers in out.items():
            hits = fnmatch.fnmatchcase(name, pattern) | np.array(
                [fnmatch.fnmatchcase(n, pattern) for n in _layer_names(name, len(layers))]
                if layers.ndim
                else False
            )
            found, out[name] = found or bool(hits.any()), layers | hits
        if not found:
            raise UserError(
                f"optimizer.freeze: no parameter matches '{pattern}'{_near(out, pattern)}"
            )
    return out


def _layer_names(name: str, layers: int) -> list[str]:
    """'blocks.mlp.up' -> 'blocks.0.mlp.up', 'blocks.1.mlp.up' ..."""
    return [f"{_STACKED}{i}.{name.removeprefix(_STACKED)}" for i in range(layers)]


def _near(names: dict[str, np.ndarray], pattern: str) -> str:
    known = list(names)
    for name, layers in names.items():
        known += _layer_names(name, layers.size) if layers.ndim else []
    close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = [n.replace(_STACKED, f"{_STACKED}N.", 1) for n in names if not is_adapter(n)]
    return f" (there are {', '.join(shown)}; N is a layer from 0 on)"


def _decayed(name: str, layers: int | None, config: Config) -> np.ndarray:
    """`layer_decay` to the power of how far a parameter lies below the head: float32 [] or [L].

    Embeddings have depth 0, layer l has l + 1, and what comes after the last of L layers has L + 1,
    which learns at the full rate (Clark et al. 2020, appendix A; their code counts one step more
    between the last layer and the head).
    """
    top = config.model.layers + 1
    if layers is not None:
        depth = np.arange(1, layers + 1)
    else:
        below = name.endswith("embedding")
        if name.startswith("norm.") and config.model.norm_placement == "post":
            below = True  # the norm of the embeddings
        depth = np.array(0 if below else top)
    return np.asarray(config.optimizer.layer_decay ** (top - depth), np.float32)


def split(parameters: Parameters, rates: Rates) -> tuple[Parameters, Parameters]:
    """(those of which some part learns, those that are frozen as a whole)."""
    learning = {name: x for name, x in parameters.items() if np.any(rates[name])}
    return learning, {name: x for name, x in parameters.items() if name not in learning}


def mask(gradients: Parameters, rates: Rates) -> Parameters:
    """Gradients with zeros for frozen layers, which then count in no norm and no moment."""
    return {
        name: g if np.all(rates[name]) else g * _column(np.sign(rates[name]), g)
        for name, g in gradients.items()
    }


def scaled(rule: optax.GradientTransformation, rates: Rates) -> optax.GradientTransformation:
    """`rule` with its updates multiplied by the rates."""
    if all(np.all(rate == 1.0) for rate in rates.values()):
        return rule

    def scale(updates, state, parameters=None):
        del parameters

        def one(name: str, u: jax.Array) -> jax.Array:
            rate = _column(rates[name], u)
            # Adding -0 leaves every number as it is; adding 0 would turn -0 into 0.
            return jnp.where(rate == 0, -0.0, u * rate)

        return {name: one(name, u) for name, u in updates.items()}, state

    return optax.chain(rule, optax.GradientTransformation(lambda _: optax.EmptyState(), scale))


def _column(rate: float | np.ndarray, like: jax.Array) -> np.ndarray:
    """A rate with as many axes as what it multiplies."""
    rate = np.asarray(rate, np.float32)
    return rate.reshape(rate.shape + (1,) * (like.ndim - rate.ndim))


def count(parameters: Parameters, rates: Rates) -> int:
    """How many numbers of `parameters` learn."""
    return sum(
        round(x.size * float(np.mean(np.asarray(rates[name]) != 0)))
        for name, x in parameters.items()
    )


def frozen_in_products(parameters: Parameters, rates: Rates, model: ModelConfig) -> float:
    """How many numbers of the weights of a token's matrix products are frozen: adapters aside."""
    weights = {
        name: x
        for name, x in parameters.items()
        if not name.endswith(("embedding", "bias", "scale", *_POOLER)) and not is_adapter(name)
    }
    if model.tied_head:
        weights["embedding"] = parameters["embedding"]
    moe, out = model.moe, 0.0
    for name, x in weights.items():
        frozen = x.size - count({name: x}, rates)
        # Of experts, as many as a token goes to.
        experts = moe.experts > 0 and name.endswith((".up", ".gate", ".down"))
        out += frozen * moe.experts_per_token / moe.experts if experts else frozen
    return out
