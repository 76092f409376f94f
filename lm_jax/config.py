"""The configuration: typed dataclasses, and the only home of every default.

A recipe in `configs/` returns a `Config`; flags override single fields (`--config.optimizer.name=
lion`); `lm_jax.validation` then checks what can be checked before any data or device is touched.
This file imports nothing heavy, so that `--help` stays fast.
"""

import dataclasses
import math
from typing import Any

from lm_jax.applications import APPLICATIONS

field = dataclasses.field


def resumable(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes what is reported, how long the run
    is or where it runs, but not what an already configured run has learned."""
    return field(default=default, metadata={"resumable": True})


def choice(default: str, *others: str, resumable: bool = False) -> Any:
    """A string field that takes `default` or one of `others`; see `resumable`."""
    choices = (default, *others)
    return field(default=default, metadata={"choices": choices, "resumable": resumable})


@dataclasses.dataclass(unsafe_hash=True)  # hashable: part of the static side of jitted code
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained at."""

    kind: str = choice("none", "linear", "llama3")
    factor: float = 1.0  # how many times longer than the original length
    low_frequency_factor: float = 1.0  # llama3: below this many turns, fully stretched
    high_frequency_factor: float = 4.0  # llama3: above this many turns, untouched
    original_length: int = 8192  # llama3: the length trained at


@dataclasses.dataclass(unsafe_hash=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): only they are trained, and only they are saved."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # what an adapter adds is scaled by alpha / rank
    # The projections of each block that get one: of query, key, value, out, up, gate and down, or
    # 'all'.
    targets: tuple[str, ...] = ("query", "value")


@dataclasses.dataclass(unsafe_hash=True)
class MoeConfig:
    """A mixture of experts in place of each layer's feed-forward; no token is dropped."""

    experts: int = 0  # 0: none; each is as wide as model.mlp_width
    experts_per_token: int = 2
    # Those of a token's experts sum to 1, as in Mixtral; False: they are the probabilities that the
    # router gives them among all experts.
    normalize_weights: bool = True


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """The Transformer. The defaults are GPT-2 124M's (Radford et al. 2019)."""

    vocab_size: int | None = None  # None: the tokenizer's; above 1024, a multiple of 128
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None  # None: as many as heads; fewer is grouped-query attention
    head_width: int | None = None  # None: width / heads
    mlp_width: int | None = None  # of an expert, if there are any; None: 4 x width
    max_length: int = 1024  # the longest sequence, in tokens
    causal: bool = True  # False: every token sees the whole of its document
    # The tokens of a prompt see the whole of it, both ways; those after it see what is before them
    # (the prefix LM of UniLM, Dong et al. 2019, and of T5, Raffel et al. 2020, section 3.2).
    prefix_attention: bool = False
    norm: str = choice("layernorm", "rmsnorm")
    norm_epsilon: float = 1e-5
    # post: after each residual sum, as BERT; both: before and after each branch, as Gemma 2.
    norm_placement: str = choice("pre", "post", "both")
    position: str = choice("learned", "rope")
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    # How many tokens back each layer sees, itself included, repeated over the layers; 0: all of
    # them. (4096, 0) is every second layer; (): all layers see all.
    windows: tuple[int, ...] = ()
    window_rope_theta: float | None = None  # of layers with a window, unscaled; None: as the others
    token_types: int = 0  # kinds of tokens with an embedding each, as BERT's two sentences
    embedding_scale: bool = False  # times sqrt(width), as Gemma
    activation: str = choice("gelu_tanh", "gelu", "silu", "relu", "relu_squared")
    gated_mlp: bool = False  # True: activation(gate) * up, as SwiGLU (Shazeer 2020)
    qkv_bias: bool = True  # biases of the query, key and value projections
    out_bias: bool = True  # bias of attention's output projection
    mlp_bias: bool = True
    norm_bias: bool = True  # layernorm only
    qk_norm: bool = False  # RMS norm over the head width of queries and keys, before RoPE
    attention_scale: float | None = None  # of the scores; None: head_width ** -0.5
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap), as Gemma 2; 0: none
    logits_softcap: float = 0.0
    # masked_lm: a dense layer, the activation and a norm before the logits, and a bias, as BERT;
    # classify: scores of `labels` classes, after the pooler if there is one; span: two scores of a
    # token, as the first and as the last of an answer; none: the model ends
    # with its hidden states.
    head: str = choice("linear", "masked_lm", "classify", "span", "none")
    labels: int = 0  # classes of a head 'classify'; set from data.labels
    tied_head: bool = True  # the head shares the token embedding
    pooler: bool = False  # a dense layer and tanh on the first token, as BERT
    moe: MoeConfig = field(default_factory=MoeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    # The published family that it is exported as, by its model_type; '': the first that has this
    # shape. Set where a published model is read.
    family: str = ""
    init_std: float = 0.02
    dropout: float = 0.0  # on the embedding, each residual branch and the attention weights
    dtype: str = choice("bfloat16", "float32", resumable=True)  # compute; parameters are float32
    # In training, the operands of the blocks' products are 8-bit floats (Micikevicius et al. 2022),
    # for GPUs that multiply them faster than bfloat16: NVIDIA's from Ada and Hopper on.
    float8: bool = resumable(False)
    # int8: the weights of the embedding, the head and the blocks' products have eight bits and a
    # scale for each output. For what is trained already (--quantize).
    quantize: str = choice("none", "int8")
    # What the backward pass computes again to save memory; the more, the further to the right.
    # offload: as full, with the blocks' inputs in the host's memory.
    remat: str = choice(
        "none", "all_dots", "dots", "heads", "attention", "full", "offload", resumable=True
    )
    scan_layers: bool = resumable(True)  # False unrolls; the parameters are stacked either way
    # How it is computed; auto: the fastest that this platform has for this model.
    attention: str = choice("auto", "xla", "cudnn", "splash", "ring", "tiled", resumable=True)


# What of `model` is the recipe's with `init_from` as well; all else comes with the weights.
NOT_OF_THE_WEIGHTS = (
    "dropout",
    "dtype",
    "float8",
    "quantize",
    "remat",
    "scan_layers",
    "attention",
    "lora",
)


@dataclasses.dataclass
class TokenizerConfig:
    """Which tokenizer, and how it is trained where it is not there yet."""

    kind: str = choice("sentencepiece", "bytes", "characters", "file")
    path: str = ""  # kind 'file': a published model's folder, a tokenizer.json or a .model
    vocab_size: int = 8192  # sentencepiece: pieces to learn
    algorithm: str = choice("bpe", "unigram")  # sentencepiece
    train_bytes: int = 10_000_000  # text to learn from, spread evenly over the training documents


# Objectives whose data are examples, records with fields, and not running text.
OF_EXAMPLES = ("complete", "chat", "classify", "extract")
# Heads that score no vocabulary, which are drawn anew where a model was trained for another end.
OWN_HEADS = {"classify": "classify", "extract": "span"}  # of objectives
LEAST_MASKED_LENGTH = 3  # tokens of a row: [CLS], one that can be masked, [SEP]


@dataclasses.dataclass
class DataConfig:
    """From text to packed rows."""

    # Paths, folders, globs, 'python:', 'tokens:DIR' (of lm_jax.tokenize) or 'tfds:NAME[/CONFIG]',
    # behind which a split may stand in brackets: 'tfds:squad[train[:10%]]'.
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # one a source: its share of the documents; (): by size
    validation_sources: tuple[str, ...] = ()  # (): split off from `sources`
    validation_split: str = choice("document", "tail")  # tail: the end of each document
    validation_fraction: float = 0.01
    document: str = choice("file", "paragraph", "line")  # what one document is in a text file
    text_key: str = "text"  # the field of JSONL, Parquet and TFDS records
    # A record that cannot be read; those that are skipped are counted.
    on_error: str = choice("raise", "skip", resumable=True)
    length: int = 1024  # tokens a row
    batch_size: int = 8  # rows a step, over all hosts and micro-batches
    packing: str = choice("first_fit", "concatenate", "crop")
    packing_bins: int = 64  # first_fit: rows open at a time, in each lane
    attend_across_documents: bool = False
    # What is predicted: the next token; tokens that were masked (BERT, Devlin et al. 2018); or of
    # examples, whose fields fill the templates below, the target alone (complete), what the
    # assistant says (chat), the class of a text (classify), or where an answer stands in a text
    # (extract).
    objective: str = choice("next_token", "masked", "complete", "chat", "classify", "extract")
    # What is given, such as 'Question: {question} Answer:'. chat: what the user says; without a
    # target, '{messages}', the field of a whole conversation.
    prompt: str = ""
    # What is to be told: complete, chat and extract, as '{answer}'; classify, the label: an integer
    # is its number, a text its name, or of digits its number where no name is made of digits.
    # A field may hold several right answers; the first is learned.
    target: str = ""
    # chat: the answers of a conversation are learned in one example, or each in one of its own, to
    # which all before it is given. None: together but, as prefix attention reads all that is given
    # both ways, apart with it.
    turns: str | None = field(default=None, metadata={"choices": (None, "together", "apart")})
    context: str = ""  # extract: the text that the answer is a part of, as '{context}'
    # extract: the field that says at which characters of the context the answers begin; '': their
    # first place in it.
    answer_starts: str = ""
    # complete, chat and extract: there may be no answer (SQuAD 2.0, Rajpurkar et al. 2018). An
    # empty list of answers, or an empty text, says so and is learned; else it is an error.
    unanswerable: bool = False
    stride: int = 128  # extract: tokens that two windows of a long context share
    labels: tuple[str, ...] = ()  # classify: the names of the classes; label 0 is the first
    # classify: the hidden state that tells the class, the first token's, the last's, or the mean of
    # all of them; None: the first, of a causal model the last.
    pooling: str | None = field(default=None, metadata={"choices": (None, "first", "last", "mean")})
    mask_rate: float = 0.15  # masked: of the tokens; 80% of them masked, 10% random, 10% as is
    mask_whole_words: bool = False  # masked: all tokens of a word or none
    shuffle: bool = True
    epochs: int | None = None  # None: as many as the steps need
    # Independent streams, which processes share out. None: the largest divisor of batch_size up to
    # 16, or to a quarter of it if that is more.
    lanes: int | None = None
    workers: int = resumable(0)  # processes that read ahead; 0 reads in a thread

    @property
    def predictions(self) -> int:
        """Positions of a row that have a prediction: all, or with masks room for a share of them,
        rounded up to a multiple of 8 as matrix units like it."""
        if self.objective != "masked":
            return self.length
        return min(self.length, -(-math.ceil(self.mask_rate * self.length) // 8) * 8)


@dataclasses.dataclass
class TaskConfig:
    """What the examples are for: how answers are obtained and scored, of the validation split."""

    # Which application, and with it the metrics; none: the loss alone.
    name: str = choice("none", *APPLICATIONS, resumable=True)
    metrics: tuple[str, ...] = resumable(())  # (): those of the task
    max_tokens: int | None = resumable(None)  # of an answer; None: the task's
    beams: int = resumable(1)  # 1: greedily, the most probable token each time
    length_penalty: float = resumable(1.0)  # of beams: the more, the longer the answer
    # extract, with data.unanswerable: there is no answer where that scores higher than the best one
    # by more than this (Devlin et al. 2018, section 4.3, with the other sign).
    null_threshold: float = resumable(0.0)
    every: int = resumable(0)  # steps of training; 0: at the end alone
    examples: int | None = resumable(None)  # the first so many; None: all
    rows: int = resumable(16)  # examples answered at a time
    keep_best: bool = resumable(False)  # the checkpoint that the first metric finds best as well


@dataclasses.dataclass
class OptimizerConfig:
    """The update rule and its schedule."""

    name: str = choice("adamw", "adafactor", "lion", "muon")
    learning_rate: float = 6e-4  # the peak
    schedule: str = choice("cosine", "linear", "rsqrt", "wsd", "constant")
    warmup_steps: int = 100
    # wsd: how long the final decay takes (None: a fifth of the run); others: the step at which it
    # ends (None: the last).
    decay_steps: int | None = None
    final_fraction: float = 0.1  # of the peak, at the end of cosine, linear and wsd
    b1: float = 0.9  # adamw and lion; adam's part of muon
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # times the learning rate; of all but norms and biases
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    # Parameters not to train, by pattern: 'embedding', 'blocks.[0-5].*', '*.mlp.*'.
    freeze: tuple[str, ...] = ()
    layer_decay: float = 1.0  # each layer learns at so many times the rate of the one above it
    muon_momentum: float = 0.95
    muon_learning_rate: float = 0.02  # of the matrices; `learning_rate` is for all the rest


@dataclasses.dataclass
class TrainingConfig:
    """The loop."""

    steps: int = resumable(1000)
    seed: int = 0
    accumulation: int = 1  # micro-batches a step
    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM, section 5)
    # Share of a target that goes to all ids alike (Szegedy et al. 2016). The loss that is shown and
    # validated has none of it.
    label_smoothing: float = 0.0
    # Weights of what keeps the routers of experts in order: the load-balancing loss (Switch
    # Transformer, Fedus et al. 2021) and log(Z)^2 (ST-MoE, Zoph et al. 2022). With accumulation
    # the first costs another forward pass, since the load is that of the whole batch.
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    # Positions of a device whose logits exist at a time; None: as many as fit in 512 MiB, on CPUs
    # in 16.
    loss_chunk: int | None = resumable(None)
    evaluate_every: int = resumable(250)  # steps; 0: never
    evaluate_batches: int | None = resumable(None)  # None: the whole validation split
    evaluate_batch_size: int | None = resumable(None)  # rows; None: a micro-batch
    sample_every: int = resumable(0)  # steps; 0: at the start and at the end
    sample_prompt: str = resumable("")
    # To generate; of a masked model, to hide in the prompt and fill in. 0: no samples.
    sample_tokens: int = resumable(0)
    hang_after: float = resumable(1800.0)  # seconds in which nothing moves; 0: never


@dataclasses.dataclass
class MeshConfig:
    """Devices along each named axis. One axis may be -1: it takes the devices that are left."""

    data: int = resumable(-1)  # copies of the model, each with a part of the batch
    fsdp: int = resumable(1)  # parts of the batch that also share the parameters out
    tensor: int = resumable(1)  # parts of each layer's heads and feed-forward
    sequence: int = resumable(1)  # parts of each row; they share the parameters out as well
    expert: int = resumable(1)  # parts of the experts, and of the batch


@dataclasses.dataclass
class CheckpointConfig:
    every: int = resumable(500)  # steps; 0: only at the end
    keep: int = resumable(2)  # the newest so many
    keep_every: int | None = resumable(None)  # and each multiple of so many steps, for good


@dataclasses.dataclass
class FaultsConfig:
    """What a run does when something is wrong with its numbers."""

    # A step whose loss or gradient is no number changes nothing; so many in a row end the run.
    skips: int = resumable(10)
    # A loss that is so many standard deviations above the mean of the last ones takes the run back
    # to a checkpoint, from which it goes on with the text behind that loss (PaLM, Chowdhery et al.
    # 2022, section 5.1). 0: none does.
    spike: float = resumable(0.0)
    spike_window: int = resumable(128)  # how many last losses
    rewinds: int = resumable(8)  # so many times; the next such loss ends the run


@dataclasses.dataclass
class LoggingConfig:
    every: int = resumable(10)  # steps
    tensorboard: bool = resumable(True)
    wandb: str = resumable("")  # project; needs the extra: pip install 'lm_jax[wandb]'
    profile_steps: tuple[int, ...] = resumable(())  # (first, last): a trace into WORKDIR/profile


@dataclasses.dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    # A workdir or a Hugging Face folder: this run starts from its weights and has its tokenizer and
    # the shape of its model, whatever the recipe says of them.
    init_from: str = ""
