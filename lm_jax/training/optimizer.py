"""Optimizers and learning-rate schedules, from optax, with decay decided by a parameter's name."""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lm_jax.config import OptimizerConfig
from lm_jax.model.parameters import Parameters

# The last part of a parameter's name -> (is decayed, axes that Muon's matrix reduces over and axes
# that it gives), counted from the end: a stacked parameter is one matrix a layer. None: not Muon's.
# Embeddings and the head are left to Adam, as by Muon's author (Jordan et al. 2024).
_RULES: dict[str, tuple[bool, contrib.MuonDimensionNumbers | None]] = {
    "embedding": (True, None),
    "position_embedding": (True, None),
    "type_embedding": (True, None),
    "head": (True, None),
    "head_dense": (True, None),
    "pooler": (True, None),
    "query": (True, contrib.MuonDimensionNumbers((-3,), (-2, -1))),
    "key": (True, contrib.MuonDimensionNumbers((-3,), (-2, -1))),
    "value": (True, contrib.MuonDimensionNumbers((-3,), (-2, -1))),
    "out": (True, contrib.MuonDimensionNumbers((-3, -2), (-1,))),
    "up": (True, contrib.MuonDimensionNumbers((-2,), (-1,))),
    "gate": (True, contrib.MuonDimensionNumbers((-2,), (-1,))),
    "down": (True, contrib.MuonDimensionNumbers((-2,), (-1,))),
    "router": (True, None),
    "a": (True, None),  # of an adapter: matrices so thin that their spectrum says little
    "b": (True, None),
    "scale": (False, None),
    "query_bias": (False, None),
    "key_bias": (False, None),
    "value_bias": (False, None),
    "out_bias": (False, None),
    "up_bias": (False, None),
    "gate_bias": (False, None),
    "down_bias": (False, None),
    "head_bias": (False, None),
    "head_dense_bias": (False, None),
    "pooler_bias": (False, None),
    "bias": (False, None),
}


def check_rules(names: list[str]) -> None:
    """Raises ValueError if a parameter is not covered."""
    missing = [name for name in names if name.rpartition(".")[2] not in _RULES]
    if missing:
        raise ValueError(f"no optimizer rule for {', '.join(missing)}")


def _decays(parameters: Parameters) -> dict[str, bool]:
    return {name: _RULES[name.rpartition(".")[2]][0] for name in parameters}


def _muon_axes(parameters: Parameters) -> dict[str, contrib.MuonDimensionNumbers | None]:
    return {name: _RULES[name.rpartition(".")[2]][1] for name in parameters}


def _is_muons(parameters: Parameters) -> dict[str, bool]:
    return {name: axes is not None for name, axes in _muon_axes(parameters).items()}


def _stacks(parameters: Parameters) -> dict[str, int]:
    """Leading axes that stack matrices: of blocks the layers, and the experts where there are."""

    def axes(name: str, x: jax.Array) -> int:
        experts = x.ndim == 4 and name.endswith((".up", ".gate", ".down"))
        return name.startswith("blocks.") + experts

    return {name: axes(name, x) for name, x in parameters.items()}


def _one_by_one(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` on each part of stacked parameters [L, ...] as if it stood alone."""

    def mapped(function):
        def apply(first, *rest):  # optax.partition also asks for nothing at all
            return (jax.vmap(function) if jax.tree.leaves(first) else function)(first, *rest)

        return apply

    def update(updates, state, parameters=None):
        return mapped(rule.update)(updates, state, parameters)

    return optax.GradientTransformation(mapped(rule.init), update)


def make_schedule(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Step -> learning rate: linear warm-up to the peak, then the decay that the config names.

    Args:
      steps: of the whole run, where `decay_steps` does not say otherwise.
      peak: instead of `config.learning_rate`.
    """
    peak = config.learning_rate if peak is None else peak
    warmup, final = config.warmup_steps, config.final_fraction * peak
    total = max(warmup + 1, steps if config.decay_steps is None else config.decay_steps)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, total - warmup, config.final_fraction)
        case "linear":
            decay = optax.linear_schedule(peak, final, total - warmup)
        case "rsqrt":  # Shazeer and Stern 2018: falls as 1 / sqrt(step) from the end of warm-up

            def decay(step):
                # Also called, with steps below 0, during the warm-up; not used then.
                return peak * (max(warmup, 1) / (jnp.maximum(step, 0) + max(warmup, 1))) ** 0.5

        case "wsd":  # Hu et al. 2024: warm up, stay, decay linearly over the last steps
            length = max(1, steps // 5) if config.decay_steps is None else config.decay_steps
            length = min(length, max(1, steps - warmup))  # it ends where the run ends
            decay = optax.linear_schedule(peak, final, length, max(0, steps - warmup - length))
        case "constant":
            decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    # Step 0 already learns: a rate of 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then the update rule with its schedule and decay."""
    rate, decay = make_schedule(config, steps), config.weight_decay
    match config.name:
        case "adamw":  # Loshchilov and Hutter 2019
            rule = optax.adamw(
                rate, config.b1, config.b2, config.epsilon, weight_decay=decay, mask=_decays
            )
        case "lion":  # Chen et al. 2023
            rule = optax.lion(rate, config.b1, config.b2, weight_decay=decay, mask=_decays)
        case "adafactor":  # Shazeer and Stern 2018; the rate is absolute, as AdamW's
            # Heads are narrower than optax's bound of 128, and would keep whole second moments.
            factored = optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0)
            )
            layered = _one_by_one(factored)
            rule = optax.chain(
                optax.partition({0: factored, 1: layered, 2: _one_by_one(layered)}, _stacks),
                optax.add_decayed_weights(decay, mask=_decays),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":  # Jordan et al. 2024
            matrices = contrib.muon(
                make_schedule(config, steps, config.muon_learning_rate),
                beta=config.muon_momentum,
                weight_decay=decay,
                muon_weight_dimension_numbers=_muon_axes,
            )
            # Not the Adam inside of optax's Muon: that one has Nesterov's momentum, and decays
            # either all it is given or nothing.
            rest = optax.adamw(
                rate, config.b1, config.b2, config.epsilon, weight_decay=decay, mask=_decays
            )
            rule = optax.partition({True: matrices, False: rest}, _is_muons)
    if not config.clip_norm:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
