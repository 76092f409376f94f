"""GPT-2 in its four sizes, trained as nanoGPT trains 124M on OpenWebText (validation loss 2.85).

Sources:
  [gpt2] Radford et al. 2019, table 2, and the hparams.json published with the weights.
  [nano] config/train_gpt2.py and the defaults of train.py in github.com/karpathy/nanoGPT, 3adf61e.
  [gpt3] Brown et al. 2020, table 2.1: the rates of the next sizes, which [nano] does not give.

Name the text with --config.data.sources=... . The tokenizer is a SentencePiece model as large as
GPT-2's, trained on that text; for GPT-2's own, add --config.tokenizer.kind=file and
--config.tokenizer.path=tokenizer.json.
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

#           layers, width, heads [gpt2], learning rate
_VARIANTS = {
    "124m": (12, 768, 12, 6e-4),  # [nano]
    "355m": (24, 1024, 16, 3e-4),  # [gpt3], 350M
    "774m": (36, 1280, 20, 2.5e-4),  # [gpt3], 760M
    "1.5b": (48, 1600, 25, 2e-4),  # [gpt3], 1.3B
}


def get_config(variant: str = "124m") -> Config:
    layers, width, heads, learning_rate = choose(variant, _VARIANTS)
    return Config(
        model=ModelConfig(
            layers=layers,
            width=width,
            heads=heads,
            max_length=1024,  # [gpt2]
            norm="layernorm",
            norm_epsilon=1e-5,
            position="learned",
            activation="gelu_tanh",
            qkv_bias=True,  # [gpt2]; [nano] trains without
            out_bias=True,
            mlp_bias=True,
            norm_bias=True,
            tied_head=True,
            init_std=0.02,
            dropout=0.0,  # [nano]
            remat="dots" if variant == "124m" else "full",  # memory only
        ),
        tokenizer=TokenizerConfig(
            kind="sentencepiece",
            vocab_size=50257,  # [gpt2]; the model rounds it up to 50304, as [nano] does
            train_bytes=100_000_000,
        ),
        data=DataConfig(
            length=1024,
            batch_size=480,  # [nano]: 12 rows x 40 micro-batches, 491,520 tokens
            packing="concatenate",  # [nano] cuts windows out of one stream of documents
            attend_across_documents=True,
            validation_fraction=0.0005,  # [nano] data/openwebtext/prepare.py
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="cosine",
            final_fraction=0.1,  # [nano] min_lr 6e-5
            warmup_steps=2000,
            b1=0.9,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=600_000,  # [nano]: 300 billion tokens
            accumulation=5,  # [nano], for 8 devices of 40 GB; 40 for one
            evaluate_every=1000,
            evaluate_batches=25,  # [nano]: 200 x 12 rows
        ),
        checkpoint=CheckpointConfig(every=1000),
        logging=LoggingConfig(every=10),
    )
