"""A small GPT on the text of the user's own Python, in four minutes on two CPU cores.

Nothing is downloaded: the corpus is the standard library's sources and pydoc's topics. The shape is
GPT-2's in small, with Llama's rotary positions, RMS norm and SwiGLU, which learn faster.
"""

from lm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from lm_jax.recipes import choose


def get_config(variant: str = "only") -> Config:
    choose(variant, {"only": None})
    return Config(
        model=ModelConfig(
            layers=4,
            width=256,
            heads=4,
            mlp_width=704,
            max_length=256,
            norm="rmsnorm",
            position="rope",
            activation="silu",
            gated_mlp=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            qk_norm=True,
            init_std=0.06,  # 1 / sqrt(width)
            dtype="float32",  # a CPU computes bfloat16 more slowly
            scan_layers=False,  # four layers compile fast, and run faster in a row
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=2048, train_bytes=2_000_000),
        data=DataConfig(
            sources=("python:",),
            length=128,
            batch_size=16,
            packing="first_fit",
            validation_fraction=0.02,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=3e-3,
            schedule="wsd",  # Hu et al. 2024: no length has to be known until the decay begins
            warmup_steps=40,
            final_fraction=0.1,
        ),
        training=TrainingConfig(
            steps=360,
            evaluate_every=120,
            evaluate_batches=8,
            sample_prompt="def ",
            sample_tokens=80,
        ),
        checkpoint=CheckpointConfig(every=120),
        logging=LoggingConfig(every=10),
    )
