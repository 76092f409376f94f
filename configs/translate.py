"""Translation from examples: a prefix LM, which reads the source both ways and writes the target.

  cpu    Multi30k (Elliott et al. 2016) within an hour on two CPU cores
  large  the same text on a GPU or TPU
  tiny   for a look at the whole, in a minute or two

Examples are records with the fields `en` and `de`; for others, set --config.data.prompt and
--config.data.target, and name the files with --config.data.sources and
--config.data.validation_sources. A published model learns it too: configs/instruct.py.

The loss is the target's alone, as in the prefix LM of T5 (Raffel et al. 2020, section 3.2).
"""

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

#         layers, width, heads, vocabulary, rows, steps, warm-up, learning rate, dropout, beams
_VARIANTS = {
    "cpu": (4, 256, 4, 6000, 32, 2100, 200, 2e-3, 0.2, 4),
    "large": (6, 512, 8, 8000, 64, 8000, 800, 1e-3, 0.3, 5),
    "tiny": (2, 64, 2, 400, 8, 40, 5, 3e-3, 0.0, 2),
}


def get_config(variant: str = "cpu") -> Config:
    layers, width, heads, vocabulary, rows, steps, warmup, rate, dropout, beams = choose(
        variant, _VARIANTS
    )
    return Config(
        model=prefix_lm(
            layers,
            width,
            heads,
            max_length=256,
            dropout=dropout,
            dtype="bfloat16" if variant == "large" else "float32",
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=vocabulary),
        data=DataConfig(
            objective="complete",
            prompt="{en}\n",
            target="{de}",
            length=128,
            batch_size=rows,
            packing="first_fit",
        ),
        task=TaskConfig(
            name="translate",
            every=steps // 2,
            examples=100,  # during training; lm_jax.evaluate reads all of them
            max_tokens=80,
            beams=beams,
            keep_best=True,
        ),
        optimizer=OptimizerConfig(
            name="muon",  # Jordan et al. 2024: of few steps it makes more
            learning_rate=rate,
            schedule="cosine",
            final_fraction=0.05,
            warmup_steps=warmup,
            b2=0.98,
            weight_decay=0.1,
        ),
        training=TrainingConfig(
            steps=steps,
            evaluate_every=max(10, steps // 6),
            label_smoothing=0.0 if variant == "tiny" else 0.1,  # as Vaswani et al. 2017
        ),
        checkpoint=CheckpointConfig(every=max(20, steps // 6)),
        logging=LoggingConfig(every=20),
    )
