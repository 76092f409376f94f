"""BERT, pretrained on masked tokens: the published sizes, and a tiny one that needs no data.

  tiny   BERT-Tiny's shape (Turc et al. 2019), a small vocabulary, on the text of the user's own
         Python: minutes on two CPU cores, nothing to download. Its positions are rotary.
         Measured: validation loss 3.55 after 600 steps, 35% of the masked tokens right (with learned
         positions 5.54 after 400 steps, 11%; rotary ones stand at 3.81 by then).
  base, large   the paper's. Name the text with --config.data.sources=... .

Sources:
  [bert] Devlin et al. 2018: section 3 for the sizes, 3.1 for the masks, A.2 for the training; what
         it leaves out from modeling.py and optimization.py in github.com/google-research/bert.
  [roberta] Liu et al. 2019, sections 3.1 and 4: as there, masks are drawn anew for each step, no
         next sentence is predicted (so there is no pooler, which nothing else would train), and
         rows are full, 512 tokens from the first step on; [bert] begins with 128.

Of the paper's objective that leaves the masked tokens; the segments' embedding stays (all tokens
are of the first kind), so that the weights are those of BERT. The tokenizer is a SentencePiece model
as large as BERT's, trained on the text; for BERT's own, add --config.tokenizer.kind=file and
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

#          layers, width, heads, vocabulary, length, batch, steps, warm-up, learning rate
_VARIANTS = {
    "tiny": (2, 128, 2, 2048, 128, 32, 600, 50, 3e-3),
    "base": (12, 768, 12, 30522, 512, 256, 1_000_000, 10_000, 1e-4),  # [bert]
    "large": (24, 1024, 16, 30522, 512, 256, 1_000_000, 10_000, 1e-4),  # [bert]
}


def get_config(variant: str = "tiny") -> Config:
    chosen = choose(variant, _VARIANTS)
    layers, width, heads, vocabulary, length, batch, steps, warmup, learning_rate = chosen
    config = Config(
        model=ModelConfig(
            layers=layers,
            width=width,
            heads=heads,
            max_length=512,
            causal=False,
            norm="layernorm",
            norm_epsilon=1e-12,  # [bert] modeling.py
            norm_placement="post",
            position="learned",
            token_types=2,
            activation="gelu",  # [bert] modeling.py: the exact one
            head="masked_lm",
            tied_head=True,
            init_std=0.02,
            dropout=0.1,
            remat="full" if variant == "large" else "none",  # memory only
        ),
        tokenizer=TokenizerConfig(
            kind="sentencepiece", vocab_size=vocabulary, train_bytes=100_000_000
        ),
        data=DataConfig(
            objective="masked",
            mask_rate=0.15,
            mask_whole_words=False,  # [bert] README.md: the later release masks whole words
            length=length,
            batch_size=batch,
            packing="first_fit",
            validation_fraction=0.001,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule="linear",
            final_fraction=0.0,
            warmup_steps=warmup,
            b1=0.9,
            b2=0.999,
            epsilon=1e-6,  # [bert] optimization.py
            weight_decay=0.01,
            clip_norm=1.0,  # [bert] optimization.py
        ),
        training=TrainingConfig(
            steps=steps,
            evaluate_every=5000,
            evaluate_batches=50,
        ),
        checkpoint=CheckpointConfig(every=5000),
        logging=LoggingConfig(every=100),
    )
    if variant == "tiny":
        config.model.dtype = "float32"  # a CPU computes bfloat16 more slowly
        config.model.scan_layers = False  # few layers: they compile fast, and run faster in a row
        config.model.position = "rope"
        config.model.init_std = 0.09  # 1 / sqrt(width)
        config.model.dropout = 0.0  # so few steps do not overfit
        config.tokenizer.train_bytes = 2_000_000
        config.data.sources = ("python:",)
        config.data.validation_fraction = 0.02
        config.training.evaluate_every, config.training.evaluate_batches = 200, 8
        config.training.sample_prompt = (
            "def read(self, size=-1):\n    if self.closed:\n        raise ValueError('closed')\n"
            "    return self.file.read(size)\n"
        )
        config.training.sample_tokens = 6
        config.checkpoint.every, config.logging.every = 200, 25
    return config
