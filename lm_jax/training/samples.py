"""What a run shows of its model's writing."""

from lm_jax.config import TrainingConfig
from lm_jax.data.tokenizer import Tokenizer
from lm_jax.generation.decoding import Generator
from lm_jax.generation.filling import fill_in
from lm_jax.generation.sampling import Sampling
from lm_jax.model.transformer import Transformer

_SAMPLING = Sampling(temperature=0.8, top_k=40)


def sample(model: Transformer, tokenizer: Tokenizer, config: TrainingConfig) -> str:
    """The prompt and its continuation; of a masked model, the prompt as it fills it in, and each
    guess with what was hidden.

    Raises:
      UserError: the prompt is empty or too long.
    """
    if model.config.causal:
        (got,) = Generator(model, tokenizer).generate(
            [config.sample_prompt],
            max_tokens=config.sample_tokens,
            sampling=_SAMPLING,
            seed=config.seed,
        )
        return config.sample_prompt + got.text
    text, guesses = fill_in(
        model, tokenizer, config.sample_prompt, hidden=config.sample_tokens, seed=config.seed
    )
    return f"{text}\n(" + ", ".join(f"{guess} for {hidden}" for hidden, guess in guesses) + ")"
