"""A GPT on one text file by characters: nanoGPT's two recipes for tinyshakespeare.

cpu: validation loss 1.88 as published; gpu: 1.4697, the best on the way to overfitting.

Sources: config/train_shakespeare_char.py, the CPU command in README.md, and the defaults of train.py
and model.py in github.com/karpathy/nanoGPT, commit 3adf61e. That text is not shipped: name the file
with --config.data.sources=input.txt
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

#           layers, heads, width, length, batch, steps, dropout, dtype
_VARIANTS = {
    "cpu": (4, 4, 128, 64, 12, 2000, 0.0, "float32"),  # README.md, "I only have a macbook"
    "gpu": (6, 6, 384, 256, 64, 5000, 0.2, "bfloat16"),  # train_shakespeare_char.py
}


def get_config(variant: str = "cpu") -> Config:
    layers, heads, width, length, batch, steps, dropout, dtype = choose(variant, _VARIANTS)
    return Config(
        model=ModelConfig(
            layers=layers,
            heads=heads,
            width=width,
            max_length=length,
            dropout=dropout,
            dtype=dtype,
            activation="gelu",  # nn.GELU() is the exact one
            attention_bias=False,  # train.py: bias = False, for norms and projections alike
            mlp_bias=False,
            norm_bias=False,
        ),
        tokenizer=TokenizerConfig(kind="characters"),
        data=DataConfig(
            validation_split="tail",  # prepare.py: the first 90% train, the last 10% validate
            validation_fraction=0.1,
            document="file",
            packing="crop",  # get_batch: windows from anywhere in the text
            length=length,
            batch_size=batch,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=1e-3,
            schedule="cosine",  # over all steps: lr_decay_iters = max_iters
            final_fraction=0.1,  # min_lr 1e-4
            warmup_steps=100,
            b1=0.9,
            b2=0.99,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        training=TrainingConfig(
            steps=steps,
            evaluate_every=250,
            evaluate_batches=None,  # nanoGPT: 20 or 200 random batches; the whole split is exact
            sample_prompt="\n",  # sample.py: start
            sample_tokens=200,
        ),
        checkpoint=CheckpointConfig(every=250),
        logging=LoggingConfig(every=10),
    )
