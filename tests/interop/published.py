"""Small random models of Transformers, one or more for each family, saved as the hub has them."""

import contextlib
import functools
import io
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers as hf

torch.set_num_threads(1)  # for tensors as small as these, others would only get in the way

DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
DISTILBERT = {
    "vocab_size": 96,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = DECODER | {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 12}

QWEN3_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

CASES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2, own head": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False)
    ),
    "gpt2, base model": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)),
    "llama 2": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**DECODER | {"num_key_value_heads": 4})
    ),
    "llama 3": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**DECODER, rope_parameters=LLAMA3_ROPE)
    ),
    "llama, biases, linear rope": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **DECODER,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        )
    ),
    "llama, base model": lambda: hf.LlamaModel(hf.LlamaConfig(**DECODER)),
    "smollm2": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**DECODER, sliding_window=None, head_dim=16)
    ),
    "mistral, window": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**DECODER, sliding_window=5)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "qwen2, upper layers windowed": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(
            **DECODER, use_sliding_window=True, sliding_window=4, max_window_layers=1
        )
    ),
    "qwen2.5, tied": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**DECODER, tie_word_embeddings=True)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)),
    "mixtral, window, base model": lambda: hf.MixtralModel(
        hf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=1, sliding_window=5)
    ),
    "qwen3 moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**DECODER, **QWEN3_EXPERTS, head_dim=16)
    ),
    "qwen3 moe, normalized, tied": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **DECODER,
            **QWEN3_EXPERTS,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=5,
        )
    ),
    "gemma 2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    ),
    "gemma 3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 7})
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)),
    "bert, own head": lambda: hf.BertForMaskedLM(
        hf.BertConfig(**ENCODER, tie_word_embeddings=False)
    ),
    "bert, base model": lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
    "bert, no pooler": lambda: hf.BertModel(hf.BertConfig(**ENCODER), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaForMaskedLM(
        hf.RobertaConfig(**ENCODER | {"type_vocab_size": 1})
    ),
    "distilbert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTILBERT)),
}  # fmt: skip


@functools.cache
def model(case: str):
    """A model in eval mode, with logits of about unit scale and no weight at a trivial value."""
    torch.manual_seed(0)
    hf.logging.set_verbosity_error()
    out = CASES[case]()
    out.set_attn_implementation("eager")
    with torch.no_grad():
        for name, p in out.named_parameters():
            scale = p.ndim == 1 and name.endswith("weight") and "gemma" not in case
            p.copy_(0.2 * torch.randn_like(p) + scale)
    out.tie_weights()
    return out.eval()


def save(case: str, folder: pathlib.Path, **options: Any) -> pathlib.Path:
    model(case).save_pretrained(folder, **options)
    return folder


def outputs(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, T, V], or hidden states [B, T, D] of a model without a head."""
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        got = model(input_ids=torch.tensor(ids), attention_mask=mask)
    return (got.last_hidden_state if "logits" not in got else got.logits).numpy()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Fails if Transformers says anything, by a warning or by its log."""
    said, logger = io.StringIO(), logging.getLogger("transformers")
    handler = logging.StreamHandler(said)
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
        hf.logging.set_verbosity(before)
    assert said.getvalue() == ""
