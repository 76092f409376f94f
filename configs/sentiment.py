"""Sentiment: the class of a sentence, told by a classifier on top of a Transformer.

  scratch  a small bidirectional model that learns from the examples alone
  bert     a published BERT, fine-tuned: add --config.init_from=FOLDER; one that was made for vectors
           of sentences is better read by --config.data.pooling=mean --config.model.pooler=False
  decoder  a published GPT-2, Llama or other model that writes, fine-tuned in the same way: its last
           token, which has seen the text, tells the class, by a head in place of the one for words
  tiny     for a look at the whole, in a minute or two

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
from lm_jax.recipes import choose, encoder, prefix_lm

#          layers, width, heads, vocabulary, length, batch, steps, warm-up, learning rate
_VARIANTS = {
    "scratch": (2, 128, 4, 6000, 64, 32, 600, 60, 5e-4),
    "bert": (12, 768, 12, 30522, 128, 8, 500, 50, 1e-4),
    "decoder": (4, 256, 4, 8192, 128, 8, 500, 50, 2e-5),
    "tiny": (2, 64, 2, 512, 32, 8, 30, 5, 1e-3),
}


def get_config(variant: str = "scratch") -> Config:
    layers, width, heads, vocabulary, length, batch, steps, warmup, rate = choose(
        variant, _VARIANTS
    )
    if variant == "decoder":
        model = prefix_lm(layers, width, heads, max_length=length, prefix_attention=False)
    else:
        model = encoder(layers, width, heads, dropout=0.1 if variant == "bert" else 0.5)
    model.head, fine_tuned = "classify", variant in ("bert", "decoder")
    if not fine_tuned:
        model.init_std = 0.05
    return Config(
        model=model,
        tokenizer=TokenizerConfig(
            kind="sentencepiece",
            vocab_size=vocabulary,
            # Kudo 2018: more of its pieces are words.
            algorithm="unigram" if variant == "scratch" else "bpe",
        ),
        data=DataConfig(
            objective="classify",
            prompt=APPLICATIONS["sentiment"].prompt,
            target=APPLICATIONS["sentiment"].target,
            labels=("negative", "positive"),
            # Of a small model the first token learns too late to look at the others.
            pooling=None if fine_tuned else "mean",
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
            weight_decay=0.01 if fine_tuned else 0.1,
        ),
        training=TrainingConfig(
            steps=steps,
            evaluate_every=max(10, steps // 6),
            label_smoothing=0.1 if variant == "scratch" else 0.0,
        ),
        checkpoint=CheckpointConfig(every=0),
        logging=LoggingConfig(every=20),
    )
