"""What a loss adds up over the positions of a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm_jax.model.moe import RouterSums


class LossSums(NamedTuple):
    """Sums over the positions that count; float32 scalars, but for the routers'."""

    loss: jax.Array  # what is to become less, and has a gradient; without the routers' part
    nll: jax.Array  # negative log-likelihood, in nats
    z: jax.Array  # log(Z)^2
    weight: jax.Array  # positions
    right: jax.Array  # positions whose target is the most probable id
    router: RouterSums | None = None  # over all real tokens; None without experts

    @classmethod
    def zero(cls) -> "LossSums":
        return cls(*(jnp.zeros((), jnp.float32),) * 5)
