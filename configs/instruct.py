"""Instructions and conversations: what the assistant says is learned.

  published  fine-tunes a published model: add --config.init_from=FOLDER. Its prompts are put in the
             model's own chat template, if it has one
  scratch    a small model that learns from the examples alone
  tiny       the same, for a look at the whole, in a minute or two

Examples are records with the field `messages`, a list of objects with `role` and `content`; or set
--config.data.prompt='{question}' --config.data.target='{answer}', say. Name the files with
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
from lm_jax.recipes import choose, prefix_lm

#          layers, width, heads, vocabulary, length, rows, steps, warm-up, learning rate, dropout
_VARIANTS = {
    "published": (4, 256, 4, 8192, 1024, 8, 200, 10, 5e-5, 0.0),
    "scratch": (6, 384, 6, 8192, 512, 32, 5000, 300, 1e-3, 0.1),
    "tiny": (2, 64, 2, 400, 128, 8, 30, 5, 3e-3, 0.0),
}


def get_config(variant: str = "published") -> Config:
    layers, width, heads, vocabulary, length, rows, steps, warmup, rate, dropout = choose(
        variant, _VARIANTS
    )
    published = variant == "published"
    return Config(
        model=prefix_lm(layers, width, heads, max_length=length, dropout=dropout),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=vocabulary),
        data=DataConfig(
            objective="chat",
            prompt=APPLICATIONS["instruct"].prompt,
            target=APPLICATIONS["instruct"].target,
            length=length,
            batch_size=rows,
            packing="first_fit",
        ),
        task=TaskConfig(name="instruct", examples=50),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=rate,
            schedule="linear",
            final_fraction=0.0,
            warmup_steps=warmup,
            b2=0.98,
            weight_decay=0.0 if published else 0.1,
        ),
        training=TrainingConfig(steps=steps, evaluate_every=max(10, steps // 4)),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(every=10),
    )
