"""Mixtral 8x7B, and a small mixture of experts for two CPU cores.

Sources:
  [moe] Jiang et al. 2024, "Mixtral of Experts": table 1 and section 2.
  [hub] config.json of mistralai/Mixtral-8x7B-v0.1, for what [moe] does not say.
  [st]  Zoph et al. 2022, "ST-MoE", section 3: the weight of the routers' z-loss.
  [qwn] Qiu et al. 2025, "Demons in the Detail": the load of experts is that of the whole batch.

How Mixtral was trained is not published: its text, batch, learning rate and length are not. For
those this recipe has the numbers of Llama 2 70B (Touvron et al. 2023, section 2.2), whose number
of active parameters is the nearest above, with a length of 4096, as there.

`tiny` is the quickstart with experts in place of its feed-forwards, on the same text: as many
parameters work for a token, of half as many again. It is short, because CPUs have no grouped product:
there `jax.lax.ragged_dot` multiplies every row by every expert.

Name the text of `8x7b` with --config.data.sources=... .
"""

from lm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    MoeConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from lm_jax.recipes import choose


def _8x7b() -> Config:
    rows = 1024  # 4M tokens: Llama 2
    return Config(
        model=_model(
            layers=32,  # the shape: [moe], table 1
            width=4096,
            heads=32,
            kv_heads=8,
            head_width=128,
            mlp_width=14336,
            max_length=32768,
            moe=MoeConfig(experts=8, experts_per_token=2, normalize_weights=True),
            rope_theta=1_000_000.0,  # [hub], down to init_std
            norm_epsilon=1e-5,
            tied_head=False,
            init_std=0.02,
            remat="full",  # memory only
        ),
        tokenizer=TokenizerConfig(vocab_size=32000, train_bytes=1_000_000_000),  # [moe], table 1
        data=DataConfig(
            length=4096, batch_size=rows, packing="concatenate", validation_fraction=0.0001
        ),
        optimizer=OptimizerConfig(
            learning_rate=1.5e-4,
            schedule="cosine",
            final_fraction=0.1,
            warmup_steps=2000,
            b1=0.9,
            b2=0.95,
            epsilon=1e-5,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=2_000_000_000_000 // (rows * 4096),  # 2 trillion tokens: Llama 2
            balance_loss=0.02,  # router_aux_loss_coef: [hub]
            router_z_loss=0.001,  # [st]
            evaluate_every=1000,
            evaluate_batches=8,
        ),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),  # an expert a device
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=10),
    )


def _model(**shape) -> ModelConfig:
    return ModelConfig(
        norm="rmsnorm",
        position="rope",
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        **shape,
    )


def _tiny() -> Config:
    return Config(
        model=_model(
            layers=4,
            width=256,
            heads=4,
            mlp_width=352,  # half of the quickstart's: a token goes to two
            max_length=256,
            moe=MoeConfig(experts=4, experts_per_token=2),
            qk_norm=True,
            init_std=0.06,  # 1 / sqrt(width)
            dtype="float32",  # a CPU computes bfloat16 more slowly
            scan_layers=False,  # four layers compile fast, and run faster in a row
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=2048, train_bytes=2_000_000),
        data=DataConfig(
            sources=("python:",), length=128, batch_size=16, validation_fraction=0.02
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, schedule="wsd", warmup_steps=20, final_fraction=0.1
        ),
        training=TrainingConfig(
            steps=120,
            balance_loss=0.02,
            router_z_loss=0.001,
            evaluate_every=60,
            evaluate_batches=8,
            sample_prompt="def ",
            sample_tokens=80,
        ),
        checkpoint=CheckpointConfig(every=60),
        logging=LoggingConfig(every=10),
    )  # fmt: skip


_VARIANTS = {"tiny": _tiny, "8x7b": _8x7b}


def get_config(variant: str = "tiny") -> Config:
    return choose(variant, _VARIANTS)()
