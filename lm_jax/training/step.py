"""The train step: (state, batch) -> (state, metrics), a pure function.

A step whose loss or gradient is not finite changes neither parameters nor moments; that it was one
stands in its metrics.

A batch is a dict of packed rows, see `lm_jax.training.loss.batch_loss`. Gradients come from
micro-batches run one after the other; each is weighted by the tokens of the whole batch, so that
accumulation changes memory and nothing else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm_jax.config import Config
from lm_jax.model import parameters as params_lib
from lm_jax.model.float8 import trained
from lm_jax.model.head import HEADS_WITHOUT_WORDS
from lm_jax.model.moe import RouterSums
from lm_jax.model.parameters import Parameters
from lm_jax.model.transformer import Transformer, skeleton_of
from lm_jax.sharding.mesh import activation_spec, reshard
from lm_jax.training.loss import batch_loss, router_load
from lm_jax.training.masking import Masking
from lm_jax.training.optimizer import make_optimizer, make_schedule
from lm_jax.training.sums import LossSums
from lm_jax.training.trainable import Rates, mask, rates, scaled, split


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    parameters: Parameters  # those that learn
    frozen: Parameters  # the others: without gradients, without moments
    optimizer: optax.OptState

    @property
    def all_parameters(self) -> Parameters:
        return self.frozen | self.parameters


@dataclasses.dataclass(frozen=True)
class Step:
    """Everything that is fixed during a run; its methods are what gets jitted."""

    skeleton: Transformer  # the module with abstract arrays
    in_use: Transformer  # the same as it is evaluated and used: see `trained`
    optimizer: optax.GradientTransformation
    rates: Rates = dataclasses.field(compare=False)  # how fast each parameter learns
    schedule: optax.Schedule
    seed: int
    accumulation: int
    label_smoothing: float
    z_loss: float
    balance_loss: float
    router_z_loss: float
    chunk: int | None
    sparse: bool  # many positions of a row have no target
    average: bool  # the head reads the mean of a text's hidden states
    masking: Masking | None = None  # None: the next token is predicted

    def init(self) -> TrainState:
        """A fresh state; a function of the seed alone, whatever the mesh."""
        return self.init_from({})

    def init_from(self, parameters: Parameters) -> TrainState:
        """A state that starts from `parameters`; those that are not among them are drawn."""
        if parameters.keys() != self.rates.keys():
            key = jax.random.fold_in(jax.random.key(self.seed), 0)
            drawn = params_lib.split(Transformer(self.skeleton.config, key))
            parameters = drawn | parameters
        parameters, frozen = split(parameters, self.rates)
        optimizer = self.optimizer.init(parameters)
        return TrainState(jnp.zeros((), jnp.int32), parameters, frozen, optimizer)

    def train(
        self, state: TrainState, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. The dropout and the masks of a step depend on (seed, step) alone."""
        key, masking_key = (
            jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), use), state.step)
            for use in (1, 2)
        )
        if self.masking is not None:  # of the whole batch, however it is split
            batch = self.masking(batch, masking_key)
        tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        routed = jnp.maximum(jnp.sum(batch["segments"] > 0).astype(jnp.float32), 1.0)

        def bound(parameters):
            return params_lib.bind(self.skeleton, state.frozen | parameters)

        def loss(parameters, micro_batch, key, load):
            sums = batch_loss(
                bound(parameters),
                micro_batch,
                chunk=self.chunk,
                sparse=self.sparse,
                average=self.average,
                z_loss=self.z_loss,
                label_smoothing=self.label_smoothing,
                dropout_key=key,
            )
            total = sums.loss / tokens
            if (router := sums.router) is not None:
                load = router.load_E if load is None else load
                total += self.balance_loss * router.balance_loss(load, routed)
                total += self.router_z_loss * router.z_loss(routed)
            return total, sums

        def key_of(index):
            return jax.random.fold_in(key, index)

        def gradient(micro_batch, index, load=None):
            of_loss = jax.grad(loss, has_aux=True)
            return of_loss(state.parameters, micro_batch, key_of(index), load)

        if self.accumulation == 1:
            gradients, sums = gradient(batch, 0)
        else:
            zero = LossSums.zero()._replace(router=RouterSums.zero(self.skeleton.config))
            inputs, load = (self._micro_batches(batch), jnp.arange(self.accumulation)), None
            if self.balance_loss:  # the load of the whole batch comes first
                load = _summed(
                    lambda b, i: router_load(bound(state.parameters), b, key_of(i)),
                    zero.router.load_E,
                    inputs,
                )
            zeros = jax.tree.map(jnp.zeros_like, state.parameters), zero
            gradients, sums = _summed(lambda b, i: gradient(b, i, load), zeros, inputs)

        gradients = mask(gradients, self.rates)
        mean, norm = sums.nll / tokens, optax.tree.norm(gradients)
        # What is no number would be one never again in all that it is added to.
        fine = jnp.isfinite(mean) & jnp.isfinite(norm)
        parameters, optimizer = self._update(gradients, state, fine)
        metrics = {
            "loss": mean,
            "gradient_norm": norm,
            "learning_rate": self.schedule(state.step),
            "tokens": sums.weight,
        }
        if self.z_loss:
            metrics["z_loss"] = self.z_loss * sums.z / tokens
        if (router := sums.router) is not None:  # without their weights: 0 is a weight too
            metrics["balance_loss"] = router.balance_loss(router.load_E, routed)
            metrics["router_z_loss"] = router.z_loss(routed)
        return TrainState(state.step + 1, parameters, state.frozen, optimizer), metrics

    def _update(self, gradients: Parameters, state: TrainState, fine: jax.Array):
        """The parameters and the optimizer's state after an update; without one, if not `fine`, but
        for the steps that schedules count."""

        def update(gradients, optimizer, parameters, fine):
            def chosen(new, old):
                if isinstance(new, optax.ScaleByScheduleState):
                    return new
                return jnp.where(fine, new, old)

            def schedule(x):
                return isinstance(x, optax.ScaleByScheduleState)

            updates, changed = self.optimizer.update(gradients, optimizer, parameters)
            changed = optax.apply_updates(parameters, updates), changed
            return jax.tree.map(chosen, changed, (parameters, optimizer), is_leaf=schedule)

        if not jax.sharding.get_abstract_mesh().empty:
            # Optimizers know nothing of explicit shardings: inside, the compiler propagates them;
            # what comes out is sharded as what went in.
            specs = jax.tree.map(
                lambda x: jax.typeof(x).sharding.spec, (state.parameters, state.optimizer)
            )
            update = jax.sharding.auto_axes(update, out_sharding=specs)
        return update(gradients, state.optimizer, state.parameters, fine)

    def _micro_batches(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """[B, T] -> [A, B / A, T]. Micro-batch a takes every A-th row from a on, so that a device
        keeps the rows it has."""

        def split(x_BT):
            x = x_BT.reshape(-1, self.accumulation, x_BT.shape[1])
            return reshard(jnp.moveaxis(x, 1, 0), activation_spec(None, "batch", "length"))

        return jax.tree.map(split, batch)

    def evaluate(
        self,
        parameters: Parameters,
        batch: dict[str, jax.Array],
        index: jax.Array,
        byte_lengths: jax.Array,
    ) -> dict[str, jax.Array]:
        """Sums over a batch, float32: `nll` in nats, `tokens` predicted, those of them `right`, and
        the `bytes` of text that the nats are about; 0 for masks, which leave most of it out, and
        for targets that are no text.

        Args:
          index: the batch's place in the evaluation, int32. Masks depend on it (and on the shape of
            the batch) alone, so that evaluations are of the same masks whatever the run.
        """
        model = params_lib.bind(self.in_use, parameters)
        if self.masking is not None:
            batch = self.masking(batch, jax.random.fold_in(jax.random.key(0), index))
        if self.masking is not None or model.config.head in HEADS_WITHOUT_WORDS:
            byte_lengths = jnp.zeros_like(byte_lengths)
        sums = batch_loss(model, batch, chunk=self.chunk, sparse=self.sparse, average=self.average)
        counted = byte_lengths.at[batch["targets"]].get(out_sharding=activation_spec("batch", None))
        return {
            "nll": sums.nll,
            "tokens": sums.weight,
            "right": sums.right,
            "bytes": jnp.sum(counted.astype(jnp.float32) * batch["weights"]),
        }


def _summed(function: Callable, zeros: Any, inputs: Any) -> Any:
    """The sum of what `function` gives for each part of `inputs`, one after the other."""

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    return jax.lax.scan(add, zeros, inputs)[0]


def make_step(config: Config, masking: Masking | None = None) -> Step:
    """The step of a validated config whose `model.vocab_size` is set.

    Args:
      masking: with objective 'masked', what `make_masking` gives.
    """
    if (masking is None) != (config.data.objective != "masked"):
        raise ValueError(f"objective {config.data.objective!r} with masking = {masking}")
    training = config.training
    skeleton = skeleton_of(config.model)
    learning = rates({k: x.shape for k, x in params_lib.split(skeleton).items()}, config)
    return Step(
        skeleton=skeleton,
        in_use=skeleton_of(trained(config.model)),
        optimizer=scaled(make_optimizer(config.optimizer, training.steps), learning),
        rates=learning,
        schedule=make_schedule(config.optimizer, training.steps),
        seed=training.seed,
        accumulation=training.accumulation,
        label_smoothing=training.label_smoothing,
        z_loss=training.z_loss,
        balance_loss=training.balance_loss,
        router_z_loss=training.router_z_loss,
        chunk=training.loss_chunk,
        sparse=config.data.objective in ("complete", "chat"),
        average=config.data.pooling == "mean",
        masking=masking,
    )
