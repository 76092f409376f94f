"""Generation against Transformers' `generate`: the same weights, prompts and greedy choice, taking
turns in one run.

    python tests/benchmarks/decoding.py --shape=smollm2_135m --rows=1
    python tests/benchmarks/decoding.py --shape=gpt2_124m --rows=16
    python tests/benchmarks/decoding.py --shape=smollm2_135m --quantize=int8

Needs torch and transformers (the `test` extra). Weights are random, so that any length can be asked
for. Each contender is a process of its own. Prints a table of medians and a JSON line, with the
share of the memory's bandwidth that reading the weights once a token comes to. The bandwidth is
that of a sum over an array of 512 MiB, on all cores.

Seen on two CPU cores, float32, 64 tokens after 32, with --rounds=3:

| shape | rows | lm_jax, tokens/s | Transformers | times | of the bandwidth |
|---|---|---|---|---|---|
| smollm2_135m | 1 | 27.7 | 14.3 | 1.93 | 67% |
| smollm2_135m | 16 | 153 | 96.4 | 1.58 | 18% |
| gpt2_124m | 1 | 35.7 | 20.2 | 1.77 | 57% |
| gpt2_124m | 16 | 197 | 98.6 | 2.00 | 38% |
| smollm2_135m, int8 | 1 | 32.0 | 12.8 | 2.50 | 19% |
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import contenders
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

SHAPES = {
    "smollm2_135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "gpt2_124m": {"model_type": "gpt2"},
    "toy": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
}
CONTENDERS = ("lm_jax", "transformers")


def write_model(shape: str, folder: pathlib.Path) -> None:
    """A published folder of random weights, with a token for each byte."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    settings = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    level = tokenizers.pre_tokenizers.ByteLevel
    vocabulary = {piece: i for i, piece in enumerate(sorted(level.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level(), tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


class _Ids:
    """In a tokenizer's place: any id is text, and none ends it."""

    least_vocabulary, stop_ids = 0, frozenset()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        return ""

    def stream(self):
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def ours(folder: str, prompts: np.ndarray, quantize: str | None):
    """A function of a number of tokens -> those that follow each prompt; and facts."""
    from lm_jax import runtime

    runtime.configure()

    import jax

    from lm_jax.config import MeshConfig
    from lm_jax.generation.decoding import Generator
    from lm_jax.generation.sampling import Sampling
    from lm_jax.sharding.mesh import make_mesh
    from lm_jax.training.inference import load_for_inference

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loaded = load_for_inference(folder, mesh, dtype="float32", quantize=quantize)
    held = sum(x.nbytes for x in jax.tree.leaves(loaded.model))
    generator = Generator(loaded.model, _Ids(loaded.model.config.vocab_size))

    def generate(tokens: int) -> list[list[int]]:
        with jax.set_mesh(mesh):
            got = generator.generate(
                list(prompts),
                max_tokens=tokens,
                sampling=Sampling(temperature=0.0),
                batch_size=len(prompts),
            )
        return [list(completion.tokens) for completion in got]

    @jax.jit
    def total(x):
        return x.sum()

    x = jax.numpy.ones((1 << 27,), jax.numpy.float32)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return generate, {"weight_bytes": held, "bandwidth": x.nbytes / min(seconds)}


def theirs(folder: str, prompts: np.ndarray):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts.astype(np.int64))

    def generate(tokens: int) -> list[list[int]]:
        got = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return got[:, ids.shape[1] :].tolist()

    return generate, {}


def work(name: str, flags: argparse.Namespace) -> None:
    """A contender: reads how many tokens to generate and answers with the time it took."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 64, (flags.rows, flags.prompt)).astype(np.int32)
    if name == "lm_jax":
        generate, facts = ours(flags.folder, prompts, flags.quantize)
    else:
        generate, facts = theirs(flags.folder, prompts)
    begun = time.perf_counter()
    generate(flags.tokens)
    facts["first"] = time.perf_counter() - begun

    def take(tokens: int) -> dict[str, Any]:
        begun = time.perf_counter()
        got = generate(tokens)
        return {"seconds": time.perf_counter() - begun, "tokens": got}

    contenders.compete(facts, take)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--rows", type=int, default=1, help="prompts at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--quantize", choices=["int8"], help="lm_jax's weights alone")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.contender:
        work(flags.contender, flags)
        return

    with tempfile.TemporaryDirectory() as folder:
        write_model(flags.shape, pathlib.Path(folder))
        sys.argv.append(f"--folder={folder}")
        processes = {name: contenders.begin(name, "cpu") for name in CONTENDERS}
        result: dict[str, Any] = {name: contenders.told(p) for name, p in processes.items()}
        seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        tokens = {}
        for _ in range(flags.rounds):
            for name, process in processes.items():
                told = contenders.turn(process, flags.tokens)
                seconds[name].append(told["seconds"])
                tokens[name] = np.array(told["tokens"])
        for process in processes.values():
            contenders.end(process)

    print(f"{'':<13} {'ms a token':>10} {'tokens/s':>9} {'first':>7}")
    for name, each in seconds.items():
        rate = flags.tokens * flags.rows / statistics.median(each)
        result[name]["tokens_per_second"] = rate
        result[name]["milliseconds"] = 1000 * flags.rows / rate
        first = result[name]["first"]
        print(f"{name:<13} {1000 * flags.rows / rate:>10.1f} {rate:>9.1f} {first:>5.1f} s")
    mine = result["lm_jax"]
    times = mine["tokens_per_second"] / result["transformers"]["tokens_per_second"]
    share = mine["weight_bytes"] / mine["bandwidth"] / (mine["milliseconds"] / 1000)
    same = float(np.mean(tokens["lm_jax"] == tokens["transformers"]))
    print(
        f"{times:.2f} times as fast; {share:.0%} of {mine['bandwidth'] / 1e9:.1f} GB/s;"
        f" {same:.0%} of the tokens are the same"
    )
    result |= {
        "shape": flags.shape,
        "rows": flags.rows,
        "prompt": flags.prompt,
        "quantize": flags.quantize,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result | {"times": round(times, 3), "share": round(share, 3), "same": same}))


if __name__ == "__main__":
    main()
