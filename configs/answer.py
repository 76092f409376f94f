"""Answers to questions about a text.

In the words of the model:
  published     fine-tunes a published model: add --config.init_from=FOLDER. Its prompts are put in
                the model's own chat template, if it has one
  scratch       a small model that learns from the examples alone
  tiny          the same, for a look at the whole, in a minute or two

As a part of the text:
  extract       fine-tunes a published BERT: add --config.init_from=FOLDER
  extract_tiny  a small model that learns from the examples alone, for a look at the whole

Examples are SQuAD's JSON (Rajpurkar et al. 2016) or records with the fields `context`, `question`
and `answers`, a list, and to extract them `answer_starts`, the characters at which they begin; for
others, set --config.data.prompt, --config.data.target, --config.data.context and
--config.data.answer_starts. Name the files with --config.data.sources and
--config.data.validation_sources. With questions that have no answer, as SQuAD 2.0 has them, set
--config.data.unanswerable=True.
"""

from lm_jax.applications import APPLICATIONS, EXTRACT
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
from lm_jax.recipes import choose, encoder, prefix_lm

#          layers, width, heads, vocabulary, length, rows, steps, warm-up, learning rate, dropout
_VARIANTS = {
    "published": (4, 256, 4, 8192, 512, 8, 200, 10, 5e-5, 0.0),
    "scratch": (6, 384, 6, 8192, 512, 32, 5000, 300, 1e-3, 0.1),
    "tiny": (2, 64, 2, 400, 128, 8, 30, 5, 3e-3, 0.0),
    "extract": (12, 768, 12, 30522, 384, 8, 2000, 200, 5e-5, 0.1),
    "extract_tiny": (2, 64, 2, 400, 64, 8, 60, 5, 3e-3, 0.0),
}


def get_config(variant: str = "published") -> Config:
    layers, width, heads, vocabulary, length, rows, steps, warmup, rate, dropout = choose(
        variant, _VARIANTS
    )
    fine_tuned, extract = variant in ("published", "extract"), variant.startswith("extract")
    if extract:
        model = encoder(layers, width, heads, head="span", dropout=dropout)
        data = DataConfig(
            objective="extract",
            **EXTRACT,
            answer_starts="answer_starts",
            stride=length // 3,
        )
    else:
        model = prefix_lm(layers, width, heads, max_length=length, dropout=dropout)
        data = DataConfig(
            objective="chat",
            prompt=APPLICATIONS["answer"].prompt,
            target=APPLICATIONS["answer"].target,
        )
    data.length, data.batch_size, data.packing = length, rows, "first_fit"
    return Config(
        model=model,
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=vocabulary),
        data=data,
        task=TaskConfig(name="answer", examples=50),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=rate,
            schedule="linear",
            final_fraction=0.0,
            warmup_steps=warmup,
            b2=0.98,
            weight_decay=0.0 if fine_tuned else 0.1,
        ),
        training=TrainingConfig(steps=steps, evaluate_every=max(10, steps // 4)),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(every=10),
    )
