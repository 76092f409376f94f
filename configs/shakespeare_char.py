"""A GPT on one text file by characters: nanoGPT's two recipes for tinyshakespeare, and a better one.

  cpu       nanoGPT's CPU recipe, but for the initial weights. It publishes a validation loss of 1.88.
  gpu       nanoGPT's GPU recipe. It publishes 1.4697, the best on the way to overfitting.
  cpu_muon  as many steps, tokens and parameters as `cpu`, with Muon, RoPE and QK-norm.

Validation losses over the whole split, measured on tinyshakespeare on two CPU cores: cpu 1.75 (1.91
with nanoGPT's initial weights), cpu_muon 1.59.

Sources: config/train_shakespeare_char.py, the CPU command in README.md, and the defaults of train.py
and model.py in github.com/karpathy/nanoGPT, commit 3adf61e. The text is not shipped: name the file
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

#          layers, heads, width, length, batch, steps, dropout, dtype, standard deviation at the start
_CPU = (4, 4, 128, 64, 12, 2000, 0.0, "float32")  # README.md, "I only have a macbook"
_VARIANTS = {
    "cpu": (*_CPU, 0.09),  # 1 / sqrt(width); nanoGPT: 0.02
    "gpu": (6, 6, 384, 256, 64, 5000, 0.2, "bfloat16", 0.02),  # train_shakespeare_char.py, model.py
    "cpu_muon": (*_CPU, 0.05),
}


def get_config(variant: str = "cpu") -> Config:
    chosen = choose(variant, _VARIANTS)
    layers, heads, width, length, batch, steps, dropout, dtype, init_std = chosen
    config = Config(
        model=ModelConfig(
            layers=layers,
            heads=heads,
            width=width,
            max_length=length,
            dropout=dropout,
            dtype=dtype,
            init_std=init_std,
            scan_layers=False,  # few layers: they compile fast, and run faster in a row
            activation="gelu",  # nn.GELU() is the exact one
            qkv_bias=False,  # train.py: bias = False, for norms and projections alike
            out_bias=False,
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
    if variant == "cpu_muon":
        config.model.position = "rope"  # Su et al. 2021
        config.model.qk_norm = True  # Henry et al. 2020
        config.optimizer.name = "muon"  # Jordan et al. 2024
        config.optimizer.muon_learning_rate = 0.02
    return config
