"""A run's train step, and a batch of rows of one document each."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lm_jax.config import Config
from lm_jax.sharding.mesh import make_mesh, to_devices
from lm_jax.training.program import jit_train_step
from lm_jax.training.step import Step, TrainState, make_step


class Begun(NamedTuple):
    mesh: Mesh
    step: Step
    update: Any  # of `jit_train_step`: takes the state and the batch, and uses the state up
    state: TrainState
    batch: dict[str, jax.Array]


def begin(config: Config, tokens: np.ndarray, devices: int = 1) -> Begun:
    """
    Args:
      tokens: int32 [B, T + 1].
      devices: how many of those there are, each with a part of the rows.
    """
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    whole = np.ones((tokens.shape[0], tokens.shape[1] - 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "segments": whole,
        "positions": whole.cumsum(axis=1, dtype=np.int32) - 1,
        "weights": whole.astype(np.float32),
    }
    with jax.set_mesh(mesh):
        step = make_step(config)
        update, state = jit_train_step(step, mesh), jax.jit(step.init)()
    return Begun(mesh, step, update, state, to_devices(batch, mesh))
