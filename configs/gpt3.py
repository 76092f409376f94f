"""The eight sizes of GPT-3.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners": table 2.1 for shapes, batch
sizes and learning rates, section 2.1 for the context, appendix B for all the rest. Where the table
contradicts itself (layer width against heads x head width), what gives the named size is taken:
  1.3b: 24 heads of 128 do not make 2048; 16 do.
  13b: a width of 5140 is not 40 heads of 128; 5120 is.

Two things are left out: half of GPT-3's layers attend to a narrow band (Child et al. 2019), here
all see everything; and its batch grows to full size over the first 4 to 12 billion tokens.

Name the text with --config.data.sources=...
"""

from lm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from lm_jax.recipes import choose

_LENGTH = 2048

#           layers, width, heads, rows a step (tokens in the table), learning rate
_VARIANTS = {
    "125m": (12, 768, 12, 256, 6e-4),  # 0.5M
    "350m": (24, 1024, 16, 256, 3e-4),  # 0.5M
    "760m": (24, 1536, 16, 256, 2.5e-4),  # 0.5M
    "1.3b": (24, 2048, 16, 512, 2e-4),  # 1M
    "2.7b": (32, 2560, 32, 512, 1.6e-4),  # 1M
    "6.7b": (32, 4096, 32, 1024, 1.2e-4),  # 2M
    "13b": (40, 5120, 40, 1024, 1e-4),  # 2M
    "175b": (96, 12288, 96, 1536, 0.6e-4),  # 3.2M; 1536 divides over more meshes than 1562
}


def get_config(variant: str = "125m") -> Config:
    layers, width, heads, rows, learning_rate = choose(variant, _VARIANTS)
    tokens = rows * _LENGTH
    small = width < 2048
    return Config(
        model=ModelConfig(
            layers=layers,
            width=width,
            heads=heads,
            max_length=_LENGTH,
            norm="layernorm",  # the architecture of GPT-2, section 2.1
            position="learned",
            activation="gelu_tanh",
            tied_head=True,
            init_std=0.02,
            dropout=0.0,
            remat="none" if small else "full",  # memory only
        ),
        tokenizer=TokenizerConfig(
            kind="sentencepiece",
            vocab_size=50257,  # GPT-2's; the model rounds it up to 50304
            train_bytes=100_000_000,
        ),
        data=DataConfig(
            length=_LENGTH,
            batch_size=rows,
            packing="concatenate",  # documents share rows, unmasked
            attend_across_documents=True,
            validation_fraction=0.001,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="cosine",
            decay_steps=260_000_000_000 // tokens,  # then on at the final rate
            final_fraction=0.1,
            warmup_steps=375_000_000 // tokens,
            b1=0.9,
            b2=0.95,
            epsilon=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=300_000_000_000 // tokens,
            evaluate_every=1000,
            evaluate_batches=8,
        ),
        mesh=MeshConfig(data=-1) if small else MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=10),
    )
