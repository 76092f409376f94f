"""BERT (Devlin et al. 2018), RoBERTa (Liu et al. 2019) and DistilBERT (Sanh et al. 2019).

Sentence-transformers' BERTs are BERTs without a head.
"""

import dataclasses

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.interop.family import (
    FLAT,
    SAME,
    Family,
    Json,
    Layout,
    Weight,
    after_rows,
    linear,
    read_activation,
    write_activation,
)

_FIXED = {"causal": False, "norm": "layernorm", "norm_placement": "post", "position": "learned"}
_KEYS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "type_vocab_size": "token_types",
    "layer_norm_eps": "norm_epsilon",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tied_head",
}
_DEFAULTS = {
    "vocab_size": 30522,
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "type_vocab_size": 2,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
}
_ONLY = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": ("absolute", None),
}
_BY_HEAD = {"classify": {"pooler": True}}
_IGNORED = ("embeddings.position_ids", "cls.seq_relationship.")


_SPANS = "qa_outputs"  # scores of a token as the first and as the last of an answer


def _dense(ours: str, theirs: str, inputs: int = 1) -> list[Weight]:
    return [
        Weight(ours, theirs + ".weight", linear(inputs)),
        Weight(f"{ours}_bias", theirs + ".bias", FLAT),
    ]


def _norm(ours: str, theirs: str) -> list[Weight]:
    return [
        Weight(f"{ours}.scale", theirs + ".weight", SAME),
        Weight(f"{ours}.bias", theirs + ".bias", SAME),
    ]


def _weights(
    model: ModelConfig,
    prefix: str,
    positions: Layout,
    head: tuple[str, str, str, str],
    classifier: tuple[str, str],
) -> list[Weight]:
    """
    Args:
      head: names of the head's dense layer, norm, bias and, where it is not tied, its weight.
      classifier: names of a classifier's dense layer before tanh, and of its last one.
    """
    block, tables = prefix + "encoder.layer.{}.", prefix + "embeddings."
    out = [
        Weight("embedding", tables + "word_embeddings.weight", SAME),
        Weight("position_embedding", tables + "position_embeddings.weight", positions),
        Weight("type_embedding", tables + "token_type_embeddings.weight", SAME),
        *_norm("norm", tables + "LayerNorm"),
        *_dense("blocks.attention.query", block + "attention.self.query"),
        *_dense("blocks.attention.key", block + "attention.self.key"),
        *_dense("blocks.attention.value", block + "attention.self.value"),
        *_dense("blocks.attention.out", block + "attention.output.dense", 2),
        *_norm("blocks.attention_norm", block + "attention.output.LayerNorm"),
        *_dense("blocks.mlp.up", block + "intermediate.dense"),
        *_dense("blocks.mlp.down", block + "output.dense"),
        *_norm("blocks.mlp_norm", block + "output.LayerNorm"),
    ]
    if model.head == "classify":
        return out + _dense("pooler", classifier[0]) + _dense("head", classifier[1])
    if model.head == "span":
        return out + _dense("head", _SPANS)
    if model.pooler:
        pooler = _dense("pooler", prefix + "pooler.dense")
        out += [dataclasses.replace(w, written=model.head == "none") for w in pooler]
    return out + _head(model, *head)


def _head(model: ModelConfig, dense: str, norm: str, bias: str, weight: str) -> list[Weight]:
    if model.head != "masked_lm":
        return []
    out = [*_dense("head_dense", dense), *_norm("head_norm", norm)]
    out.append(Weight("head_bias", bias, SAME))
    if not model.tied_head:
        # The bias beside the weight is another one then, and it is the one that counts.
        out.append(Weight("head_bias", weight.replace(".weight", ".bias"), SAME))
        out.append(Weight("head", weight, linear()))
    return out


def _read(hf: Json, unused_rows: int = 0) -> Json:
    if hf["type_vocab_size"] < 1:
        raise UserError(f"type_vocab_size must be at least 1, not {hf['type_vocab_size']}")
    return {
        "activation": read_activation(hf["hidden_act"]),
        "max_length": hf["max_position_embeddings"] - unused_rows,
    }


def _write(model: ModelConfig) -> Json:
    return {
        "max_position_embeddings": model.max_length,
        "hidden_act": write_activation(model.activation),
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
    }


BERT = Family(
    model_type="bert",
    architectures={
        "BertForMaskedLM": "masked_lm",
        "BertForPreTraining": "masked_lm",
        "BertForSequenceClassification": "classify",
        "BertForQuestionAnswering": "span",
        "BertModel": "none",
    },
    prefix="bert.",
    keys=_KEYS,
    fixed=_FIXED,
    defaults=_DEFAULTS,
    only=_ONLY,
    read=_read,
    write=_write,
    weights=lambda model: _weights(
        model,
        "bert.",
        SAME,
        (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.bias",
            "cls.predictions.decoder.weight",
        ),
        ("bert.pooler.dense", "classifier"),
    ),
    has={"pooler": "bert.pooler.dense.weight"},
    ignored=(*_IGNORED, "cls.predictions.decoder."),
    by_head=_BY_HEAD,
)

_UNUSED_ROWS = 2  # RoBERTa counts positions from the id of padding, 1, plus 1

ROBERTA = Family(
    model_type="roberta",
    architectures={
        "RobertaForMaskedLM": "masked_lm",
        "RobertaForSequenceClassification": "classify",
        "RobertaForQuestionAnswering": "span",
        "RobertaModel": "none",
    },
    prefix="roberta.",
    keys=_KEYS,
    fixed=_FIXED,
    defaults=_DEFAULTS | {"vocab_size": 50265, "pad_token_id": _UNUSED_ROWS - 1},
    # Its head computes gelu, whatever the layers do.
    only=_ONLY | {"pad_token_id": _UNUSED_ROWS - 1, "hidden_act": "gelu"},
    read=lambda hf: _read(hf, _UNUSED_ROWS),
    write=lambda model: (
        _write(model)
        | {
            "max_position_embeddings": model.max_length + _UNUSED_ROWS,
            "pad_token_id": _UNUSED_ROWS - 1,
        }
    ),
    weights=lambda model: _weights(
        model,
        "roberta.",
        after_rows(_UNUSED_ROWS),
        ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
        ("classifier.dense", "classifier.out_proj"),
    ),
    has={"pooler": "roberta.pooler.dense.weight"},
    # Its classifiers have a dense layer of their own, and may have a pooler that nobody uses.
    ignored=(*_IGNORED, "lm_head.decoder.", "roberta.pooler."),
    by_head=_BY_HEAD,
)


def _distilbert_weights(model: ModelConfig) -> list[Weight]:
    block, tables = "distilbert.transformer.layer.{}.", "distilbert.embeddings."
    head = ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight")
    return [
        Weight("embedding", tables + "word_embeddings.weight", SAME),
        Weight("position_embedding", tables + "position_embeddings.weight", SAME),
        *_norm("norm", tables + "LayerNorm"),
        *_dense("blocks.attention.query", block + "attention.q_lin"),
        *_dense("blocks.attention.key", block + "attention.k_lin"),
        *_dense("blocks.attention.value", block + "attention.v_lin"),
        *_dense("blocks.attention.out", block + "attention.out_lin", 2),
        *_norm("blocks.attention_norm", block + "sa_layer_norm"),
        *_dense("blocks.mlp.up", block + "ffn.lin1"),
        *_dense("blocks.mlp.down", block + "ffn.lin2"),
        *_norm("blocks.mlp_norm", block + "output_layer_norm"),
        *(_dense("head", _SPANS) if model.head == "span" else _head(model, *head)),
    ]


DISTILBERT = Family(
    model_type="distilbert",
    architectures={
        "DistilBertForMaskedLM": "masked_lm",
        "DistilBertForQuestionAnswering": "span",
        "DistilBertModel": "none",
    },
    prefix="distilbert.",
    keys={
        "vocab_size": "vocab_size",
        "n_layers": "layers",
        "dim": "width",
        "n_heads": "heads",
        "hidden_dim": "mlp_width",
        "max_position_embeddings": "max_length",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tied_head",
    },
    fixed=_FIXED | {"norm_epsilon": 1e-12},
    aliases={
        "num_hidden_layers": "n_layers",
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
    },
    defaults={
        "vocab_size": 30522,
        "n_layers": 6,
        "dim": 768,
        "n_heads": 12,
        "hidden_dim": 3072,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "activation": "gelu",
    },
    read=lambda hf: {"activation": read_activation(hf["activation"])},
    write=lambda model: {
        "activation": write_activation(model.activation),
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
    },
    weights=_distilbert_weights,
    refused={
        "DistilBertForSequenceClassification": "its classifier has a ReLU where those of BERT and"
        " RoBERTa have tanh"
    },
    ignored=("embeddings.position_ids",),
)
