"""All families. The first that can express a model is the one that it is exported as."""

from lm_jax.interop.families.bert import BERT, DISTILBERT, ROBERTA
from lm_jax.interop.families.gemma import GEMMA2, GEMMA3
from lm_jax.interop.families.gpt2 import GPT2
from lm_jax.interop.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from lm_jax.interop.families.moe import MIXTRAL, QWEN3_MOE
from lm_jax.interop.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        GEMMA2,
        GEMMA3,
        BERT,
        DISTILBERT,
        ROBERTA,
    )
}
