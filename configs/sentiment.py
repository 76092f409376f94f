"""Sentiment: the class of a sentence, told by a classifier on top of a Transformer.

  scratch  a small bidirectional model that learns from the examples alone
  bert     a published BERT, fine-tuned: add --config.init_from=FOLDER
  tiny     for a look at the whole, in seconds

Examples are records with the fields `text` and `label` (a number or a name); for others, set
--config.data.prompt, --config.data.target and --config.data.labels. Name the files with
--config.data.sources and --config.data.validation_sources.
"""

from lm_jax.applications import APPLICATIONS
from lm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TaskConfig,
    TokenizerConfig,
    TrainingConfig,
)
from lm_jax.recipes import choose, encoder

#          layers, width, heads, vocabulary, length, batch, steps, warm-up, learning rate
_VARIANTS = {
    "scratch": (2, 128, 4, 4096, 64, 32, 600, 60, 1e-3),
    "bert": (12, 768, 12, 30522, 128, 8, 500, 50, 1e-4),
    "tiny": (2, 64, 2, 512, 32, 8, 30, 5, 1e-3),
}


def get_config(variant: str = "scratch") -> Config:
    layers, width, heads, vocabulary, length, batch, steps, warmup, rate = choose(
        variant, _VARIANTS
    )
    return Config(
        model=encoder(
            layers, width, heads, head="classify", dropout=0.1 if variant == "bert" else 0.3
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=vocabulary),
        data=DataConfig(
            objective="classify",
            prompt=APPLICATIONS["sentiment"].prompt,
            target=APPLICATIONS["sentiment"].target,
            labels=("negative", "positive"),
            length=length,
            batch_size=batch,
            packing="first_fit",
        ),
        task=TaskConfig(name="sentiment", every=steps // 4, keep_best=True),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=rate,
            schedule="linear",
            final_fraction=0.0,
            warmup_steps=warmup,
            b2=0.999,
            weight_decay=0.01 if variant == "bert" else 0.1,
        ),
        training=TrainingConfig(steps=steps, evaluate_every=max(10, steps // 6)),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(every=20),
    )
