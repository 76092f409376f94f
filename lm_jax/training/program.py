"""The train step as it is compiled: the same program for a run and for a plan of one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.config import Config, DataConfig
from lm_jax.errors import UserError
from lm_jax.sharding.compiler import options_of
from lm_jax.sharding.mesh import batch_block, batch_sharding, batch_shards
from lm_jax.training.step import Step, TrainState


def jit_train_step(step: Step, mesh: Mesh) -> Any:
    """`step.train`, compiled for the devices of `mesh`; the state that goes in is used up."""
    return jax.jit(step.train, donate_argnums=0, compiler_options=options_of(mesh) or None)


def abstract_state(step: Step, mesh: Mesh) -> TrainState:
    """The state's shapes and shardings; nothing is computed."""

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.tree.map(placed, jax.eval_shape(step.init))


def abstract_batch(config: DataConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `lm_jax.data.loader` gives, on the mesh as `to_devices` lays it out."""
    shape, sharding = (config.batch_size, config.length), batch_sharding(mesh)
    dtypes = dict.fromkeys(("inputs", "targets", "segments", "positions"), jnp.int32)
    dtypes["weights"] = jnp.float32
    return {k: jax.ShapeDtypeStruct(shape, d, sharding=sharding) for k, d in dtypes.items()}


def check_batch(config: Config, mesh: Mesh) -> None:
    """Checks that a batch divides over the parts that the mesh splits rows and tokens in.

    Raises:
      UserError: it does not.
    """
    shards, parts = batch_shards(mesh), mesh.shape["sequence"]
    rows = config.data.batch_size // config.training.accumulation
    for key, n in (
        ("data.batch_size / training.accumulation", rows),
        ("training.evaluate_batch_size", config.training.evaluate_batch_size),
    ):
        if n % shards:
            raise UserError(
                f"{key} = {n} rows do not divide over the {shards} devices of mesh.data x"
                " mesh.fsdp x mesh.expert: change the batch or the mesh"
            )
    if config.data.length % parts:
        raise UserError(
            f"data.length = {config.data.length} tokens do not divide over mesh.sequence ="
            f" {parts}: change one of them"
        )


def rows_here(mesh: Mesh) -> dict[str, int]:
    """Which rows of a batch this process reads, as `lm_jax.data.loader.train_stream` takes it."""
    index, count = batch_block(mesh)
    return {"process_index": index, "process_count": count}
