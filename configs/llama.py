"""Llama shapes: SmolLM2 135M, Llama 3 8B and 70B, Llama 3.1 405B.

Sources:
  [smol] config.json of HuggingFaceTB/SmolLM2-135M for the shape. Training: the file published for
         its predecessor of the same shape, pre-training/smollm1/config_smollm1_135M.yaml in
         github.com/huggingface/smollm, and 2 trillion tokens as for SmolLM2 (Ben Allal et al. 2025).
  [herd] Grattafiori et al. 2024, "The Llama 3 Herd of Models": table 3 and section 3.4.1; shapes
         also from the published config.json files.
  [ll2]  Touvron et al. 2023, "Llama 2", section 2.2: Adam's constants, which [herd] does not give.

Left out: the growth of the batch during training, and the later stages of long context and
annealing. 8B and 70B are Llama 3, trained at 8192; Llama 3.1's have the same weights' shapes with
--config.model.max_length=131072 --config.model.rope_scaling.kind=llama3
--config.model.rope_scaling.factor=8.

Name the text with --config.data.sources=... . The tokenizer is a SentencePiece model of the
published size, trained on that text; for the published one, add --config.tokenizer.kind=file and
--config.tokenizer.path=tokenizer.json.
"""

from lm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    TokenizerConfig,
    TrainingConfig,
)
from lm_jax.recipes import choose


def _smollm2_135m() -> Config:
    return Config(
        model=_model(
            layers=30,  # the shape: [smol]
            width=576,
            heads=9,
            kv_heads=3,
            mlp_width=1536,
            max_length=8192,
            rope_theta=100_000.0,
            tied_head=True,
            init_std=576**-0.5,
        ),
        tokenizer=TokenizerConfig(vocab_size=49152, train_bytes=100_000_000),
        data=DataConfig(
            length=2048,
            batch_size=512,  # 1M tokens, 8 rows on each of 64 devices
            packing="concatenate",
            validation_fraction=0.001,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            schedule="wsd",
            warmup_steps=2000,
            decay_steps=400_000,  # the last fifth, linearly
            final_fraction=0.0,
            b1=0.9,
            b2=0.95,
            epsilon=1e-8,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        training=TrainingConfig(steps=2_000_000, evaluate_every=2000, evaluate_batches=8),
        checkpoint=CheckpointConfig(every=2000),
        logging=LoggingConfig(every=10),
    )


def _llama3(model: ModelConfig, mesh: MeshConfig, learning_rate: float, rows: int) -> Config:
    """Llama 3 in its first stage of training: rows of 8192 tokens."""
    steps = 15_600_000_000_000 // (rows * 8192)  # 15.6 trillion tokens: [herd], section 1
    return Config(
        model=model,
        tokenizer=TokenizerConfig(vocab_size=128256, train_bytes=1_000_000_000),
        data=DataConfig(
            length=8192,
            batch_size=rows,
            packing="concatenate",
            attend_across_documents=False,  # [herd], section 3.2
            validation_fraction=0.0001,
        ),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            schedule="cosine",
            final_fraction=0.01,  # 8e-5 to 8e-7
            warmup_steps=8000,
            b1=0.9,  # [ll2]
            b2=0.95,
            epsilon=1e-5,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(steps=steps, evaluate_every=1000, evaluate_batches=8),
        mesh=mesh,
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=10),
    )


def _model(**shape) -> ModelConfig:
    """What all Llamas have in common."""
    return ModelConfig(
        norm="rmsnorm",
        norm_epsilon=1e-5,
        position="rope",
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        **shape,
    )


def _llama3_model(layers: int, width: int, heads: int, mlp_width: int, **more) -> ModelConfig:
    return _model(
        layers=layers,  # [herd], table 3
        width=width,
        heads=heads,
        kv_heads=8,
        mlp_width=mlp_width,
        rope_theta=500_000.0,
        tied_head=False,
        remat="full",  # memory only
        **({"max_length": 8192} | more),
    )


# Of the batch, [herd] says that 405B begins with 4M tokens and ends with 16M: 8B and 70B stay at
# the former, 405B takes the latter.
_VARIANTS = {
    "smollm2_135m": _smollm2_135m,
    "llama3_8b": lambda: _llama3(
        _llama3_model(32, 4096, 32, 14336), MeshConfig(data=1, fsdp=-1), 3e-4, rows=512
    ),
    "llama3_70b": lambda: _llama3(
        _llama3_model(80, 8192, 64, 28672), MeshConfig(data=1, fsdp=-1), 1.5e-4, rows=512
    ),
    "llama3_405b": lambda: _llama3(
        _llama3_model(
            126,
            16384,
            128,
            53248,
            max_length=131072,  # published as Llama 3.1, with stretched positions
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        MeshConfig(data=1, fsdp=-1, tensor=8),  # [herd], table 4: 8-way tensor parallel
        8e-5,
        rows=2048,
    ),
}


def get_config(variant: str = "smollm2_135m") -> Config:
    return choose(variant, _VARIANTS)()
