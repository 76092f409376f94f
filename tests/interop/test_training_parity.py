"""Training as PyTorch does it: the same model, data and rules give the same losses and weights."""

import copy
import dataclasses
import functools
import math

import jax
import numpy as np
import peft
import published
import pytest
import torch
from safetensors.numpy import load_file
from test_families import load
from tiny_models import quick_jit, run_config, shard

from lm_jax.config import Config, LoraConfig, ModelConfig
from lm_jax.interop.peft import save_adapters
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import skeleton_of
from lm_jax.training.masking import Masking
from lm_jax.training.step import Step, make_step

STEPS, ROWS, LENGTH, VOCAB, SEED = 100, 8, 20, 96, 7
PAD, MASK_ID, WORDS = 0, 4, 5  # the first id that stands for text
PEAK, WARMUP, FINAL, DECAY, CLIP, MASK_RATE = 0.01, 10, 0.1, 0.1, 1.0, 0.3
PREDICTIONS = 8  # the room for 0.3 x 20 masks

Batch = dict[str, np.ndarray]


def rows(seed: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids [ROWS, length] and bool of those that are text; most rows end with padding.

    Most of the time the next id is this one plus 3, so that there is something to learn.
    """
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.choice([3, 3, 3, 5], (ROWS, length)), 1) + rng.integers(99, size=(ROWS, 1))
    real = np.arange(length) < rng.integers(length // 4, length + 4, (ROWS, 1))
    return np.where(real, WORDS + ids % (VOCAB - WORDS), PAD).astype(np.int32), real


def batch(inputs: np.ndarray, targets: np.ndarray, real: np.ndarray, weights: np.ndarray) -> Batch:
    """Ours: a document a row."""
    return {
        "inputs": inputs,
        "targets": targets,
        "segments": real.astype(np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": weights.astype(np.float32),
    }


def causal(number: int) -> tuple[Batch, Batch]:
    """The same rows for us and for them, who shift the labels themselves."""
    ids, real = rows(number, LENGTH + 1)
    labels = np.where(real, ids, -100)
    return (
        batch(ids[:, :-1], ids[:, 1:], real[:, :-1], real[:, 1:]),
        {"input_ids": ids, "attention_mask": real, "labels": labels},
    )


MASKING = Masking(MASK_RATE, PREDICTIONS, MASK_ID, np.arange(VOCAB) < WORDS, None)
draw = quick_jit(MASKING.__call__)


def masked(number: int) -> tuple[Batch, Batch]:
    """The rows that a step is given, and what it makes of them as theirs."""
    ids, real = rows(number, LENGTH)
    mine = batch(ids, ids, real, real)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 2), number)
    drawn = jax.device_get(draw(mine, key))
    labels = np.full_like(ids, -100)
    row, slot = np.nonzero(drawn["weights"])
    labels[row, drawn["predicted"][row, slot]] = drawn["targets"][row, slot]
    return mine, {
        "input_ids": drawn["inputs"],
        "attention_mask": real,
        "token_type_ids": np.zeros_like(ids),
        "labels": labels,
    }


BATCHES = {"gpt2": causal, "llama 3": causal, "bert": masked}


def step_of(model: ModelConfig, steps: int, accumulation: int = 1) -> Step:
    objective = {} if model.causal else {"objective": "masked", "mask_rate": MASK_RATE}
    config: Config = run_config(
        dataclasses.replace(model, lora=LoraConfig()),
        ROWS,
        data={"length": LENGTH} | objective,
        optimizer={
            "learning_rate": PEAK,
            "warmup_steps": WARMUP,
            "final_fraction": FINAL,
            "weight_decay": DECAY,
            "clip_norm": CLIP,
        },
        training={"steps": steps, "accumulation": accumulation, "seed": SEED},
    )
    config.model = model
    assert model.causal or config.data.predictions == PREDICTIONS
    return make_step(config, masking=None if model.causal else MASKING)


def ours(step: Step, state, case: str, steps: int):
    """Losses and gradient norms, [steps, 2], and the last state."""
    update, seen = quick_jit(step.train, donate_argnums=0), []
    for i in range(steps):
        state, metrics = update(state, shard(BATCHES[case](i)[0]))
        seen.append((metrics["loss"], metrics["gradient_norm"]))
    return np.array(jax.device_get(seen)), state


def theirs(model, case: str, steps: int) -> np.ndarray:
    """The same of a model of Transformers, which is trained in place.

    It is in eval mode, which turns dropout off and nothing else.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = (
        [p for p in learning if (p.ndim > 1) == wanted] for wanted in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)

    def rate(step: int) -> float:
        """Of the peak: up in a straight line, down by half a cosine."""
        if step < WARMUP:
            return (step + 1) / WARMUP
        done = (step - WARMUP) / (steps - WARMUP)
        return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2

    schedule, seen = torch.optim.lr_scheduler.LambdaLR(optimizer, rate), []
    for i in range(steps):
        inputs = {k: torch.tensor(x, dtype=torch.long) for k, x in BATCHES[case](i)[1].items()}
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        schedule.step()
        seen.append((loss.item(), norm.item()))
    return np.array(seen)


@functools.cache
def trained(case: str):
    """What `theirs` gives, and the model afterwards."""
    model = copy.deepcopy(published.model(case))
    return theirs(model, case, STEPS), model


@pytest.mark.parametrize("case, accumulation", [("gpt2", 2), ("bert", 1)])
def test_a_run_of_100_steps_is_that_of_pytorch(case, accumulation, tmp_path):
    model, parameters = load(published.save(case, tmp_path / "before"))
    with jax.set_mesh(parameters["embedding"].sharding.mesh):
        step = step_of(model, STEPS, accumulation)
        got, state = ours(step, quick_jit(step.init_from)(parameters), case, STEPS)
    want, model_after = trained(case)
    losses, norms = want.T
    assert losses[:5].mean() - losses[-5:].mean() > 0.5
    assert (norms > CLIP).mean() > 0.1 < (norms < CLIP).mean()  # it is clipped, and it is not
    # The last digits of float32: rounding is all that the two differ in.
    np.testing.assert_allclose(got, want, rtol=2e-5)

    model_after.save_pretrained(tmp_path / "after")
    _, after = load(tmp_path / "after")
    for name, x in after.items():
        moved = np.abs(x - parameters[name]).max()
        # Softmax is the same whatever the bias of the keys: its gradient is rounding alone, which
        # AdamW blows up.
        if not name.endswith("key_bias"):
            np.testing.assert_allclose(state.parameters[name], x, atol=1e-4, err_msg=name)
            assert moved > 0.03, name


def test_adapters_learn_as_those_of_peft(tmp_path):
    case, steps = "llama 3", 20
    model, base = load(published.save(case, tmp_path / "base"))
    targets = ("query", "value", "up", "down")
    model = dataclasses.replace(model, lora=LoraConfig(rank=4, alpha=32.0, targets=targets))
    with jax.set_mesh(base["embedding"].sharding.mesh):
        step = step_of(model, steps)
        state = quick_jit(step.init_from)(base)
        save_adapters(str(tmp_path / "before"), model, state.parameters, str(tmp_path / "base"))
        got, state = ours(step, state, case, steps)
        save_adapters(str(tmp_path / "after"), model, state.parameters, str(tmp_path / "base"))
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after")
    )
    assert not any(x.any() for name, x in before.items() if "lora_B" in name)
    there = peft.PeftModel.from_pretrained(
        copy.deepcopy(published.model(case)), tmp_path / "before", is_trainable=True
    ).eval()
    want = theirs(there, case, steps)
    assert want[:3, 0].mean() - want[-3:, 0].mean() > 0.3
    np.testing.assert_allclose(got, want, rtol=2e-5)
    adapters = peft.get_peft_model_state_dict(there)
    assert adapters.keys() == after.keys()
    for name, x in adapters.items():
        assert np.abs(after[name] - before[name]).max() > 0.03, name
        np.testing.assert_allclose(after[name], x, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["mixtral", "qwen3 moe"])
def test_the_balance_loss_is_that_of_transformers(case, tmp_path):
    """There, of all layers put together; here the mean of what it is of each."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as theirs

    config, parameters = load(published.save(case, tmp_path))
    numbers, _ = causal(0)
    ids, real = numbers["inputs"], numbers["segments"]
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}
    with torch.no_grad():
        out = published.model(case)(**given, output_router_logits=True)
    moe = config.moe
    rest = moe.experts, moe.experts_per_token, given["attention_mask"]
    each = [float(theirs((x,), *rest)) for x in out.router_logits]
    with jax.set_mesh(parameters["embedding"].sharding.mesh):
        router = _router(params_lib.bind(skeleton_of(config), parameters), shard(numbers))
    got = router.balance_loss(router.load_E, float(real.sum()))
    assert np.ptp(each) > 1e-3 and np.mean(each) > moe.experts_per_token + 1e-3
    assert float(got) == pytest.approx(np.mean(each), rel=1e-5)
    # In Transformers' way, from the same sums.
    joined = (router.load_E.sum(0) * router.probability_E.sum(0)).sum() * moe.experts
    joined /= (config.layers * real.sum()) ** 2
    assert float(joined) == pytest.approx(float(theirs(out.router_logits, *rest)), rel=1e-5)


@quick_jit
def _router(model, numbers):
    return model.forward(
        numbers["inputs"], positions_BT=numbers["positions"], segments_BT=numbers["segments"]
    )[2]
