"""Fine-tuning of a published model, or of a run, on your own text.

Name the weights with --config.init_from=DIR, a Hugging Face folder or a workdir, and the text with
--config.data.sources=... . Shape and tokenizer of the model come with the weights.

  full   all parameters learn
  lora   low-rank adapters learn: one or two in a hundred parameters, fewer of a large model

Sources:
  [alpaca]  Taori et al. 2023, the published training command: rate, warm-up, decay, batch, epochs.
  [lora]    Hu et al. 2021, table 12 (GPT-3): rank and rate.
  [qlora]   Dettmers et al. 2023, section 4 and appendix B: adapters on all projections reach what
            full fine-tuning does, those of attention alone do not; alpha 16, constant rate 2e-4.
"""

from lm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from lm_jax.recipes import choose

_VARIANTS = {
    #        adapters, learning rate, schedule
    "full": (LoraConfig(), 2e-5, "cosine"),  # [alpaca]
    "lora": (LoraConfig(rank=8, alpha=16.0, targets=("all",)), 2e-4, "constant"),  # [lora], [qlora]
}


def get_config(variant: str = "lora") -> Config:
    lora, learning_rate, schedule = choose(variant, _VARIANTS)
    return Config(
        model=ModelConfig(lora=lora, dropout=0.0, remat="full"),
        data=DataConfig(
            length=512,  # [alpaca]
            batch_size=16,  # [qlora]
            packing="first_fit",
            validation_fraction=0.05,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=learning_rate,
            schedule=schedule,
            warmup_steps=15,  # [alpaca]: 3%
            final_fraction=0.0,
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            clip_norm=1.0,
        ),
        training=TrainingConfig(steps=500, evaluate_every=100),
        checkpoint=CheckpointConfig(every=100),
        logging=LoggingConfig(every=10),
    )
