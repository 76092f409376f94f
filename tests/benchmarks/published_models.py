"""A published model here and in Transformers, both in float32: do they agree?

    python tests/benchmarks/published_models.py --model=DIR --text=FILE

Needs torch and transformers (the `test` extra). Of a causal model: perplexity of the text in
windows that do not overlap, and greedy continuations of prompts cut out of it, token by token. Of a
sentence-transformers model: the embeddings of the text's lines. Prints a table and a JSON line.

Seen on two CPU cores:

| model | text | measured | here | Transformers | difference |
|---|---|---|---|---|---|
| SmolLM2-135M-Instruct | WikiText-2, 10^5 characters | perplexity | 20.1205 | 20.1203 | 8e-6 |
| SmolLM2-135M-Instruct | 20 prompts, 64 tokens each | same tokens | 20 of 20 | | |
| all-MiniLM-L6-v2 | 20 lines of WikiText-2 | embeddings | | | 1.4e-7 |
"""

import argparse
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from lm_jax.config import MeshConfig
from lm_jax.generation.decoding import Generator
from lm_jax.generation.embedding import Pooling, embed
from lm_jax.generation.sampling import Sampling
from lm_jax.interop.sentence import read_pooling
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.inference import Loaded, load_for_inference
from lm_jax.training.loss import cross_entropy

ROWS = 4


def perplexities(loaded: Loaded, theirs, text: str, window: int) -> tuple[float, float]:
    """Ours and theirs, over windows of `window` predictions."""
    ids = loaded.tokenizer.encode(text)
    count = (len(ids) - 1) // window
    windows = np.stack([ids[i * window : (i + 1) * window + 1] for i in range(count)])

    @jax.jit
    def nll(model, rows):
        x, _ = model(rows[:, :-1])
        ones = jnp.ones((len(rows), window), jnp.float32)
        return cross_entropy(model.head_input(x), model.output_head(), rows[:, 1:], ones).nll

    ours = reference = 0.0
    for first in range(0, count, ROWS):
        rows = windows[first : first + ROWS]
        ours += float(nll(loaded.model, rows))
        rows = torch.tensor(rows.astype(np.int64))
        with torch.no_grad():
            logits = theirs(rows[:, :-1]).logits
        reference += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(ours / windows[:, 1:].size), math.exp(reference / windows[:, 1:].size)


def same_continuations(loaded: Loaded, theirs, prompts: list[str], tokens: int) -> int:
    """How many prompts both continue by the same tokens, greedily."""
    greedy = Sampling(temperature=0.0)
    got = Generator(loaded.model, loaded.tokenizer).generate(
        prompts, max_tokens=tokens, sampling=greedy, batch_size=ROWS
    )
    same = 0
    for completion in got:
        ids = torch.tensor(loaded.tokenizer.encode_prompt(completion.prompt).astype(np.int64))[None]
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        same += want[0, ids.shape[1] :].tolist() == list(completion.tokens)
    return same


def embedding_difference(loaded: Loaded, theirs, folder: str, texts: list[str]) -> float:
    """The largest difference of two numbers, with mean pooling done by hand in Transformers."""
    pooling = Pooling(**read_pooling(folder))
    assert pooling.kind == "mean", "written for models that take the mean"
    got, _ = embed(loaded.model, loaded.tokenizer, texts, pooling)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    largest = 0.0
    for text, vector in zip(texts, got):
        inputs = tokenizer(
            text, truncation=True, max_length=pooling.max_tokens, return_tensors="pt"
        )
        with torch.no_grad():
            want = theirs(**inputs).last_hidden_state[0].mean(0)
        want = want / want.norm() if pooling.normalize else want
        largest = max(largest, float(np.abs(vector - want.numpy()).max()))
    return largest


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a Hugging Face folder")
    flags.add_argument("--text", required=True, help="a text file")
    flags.add_argument("--characters", type=int, default=100_000, help="of it, from the beginning")
    flags.add_argument("--window", type=int, default=512, help="predictions a window")
    flags.add_argument("--prompts", type=int, default=20)
    flags.add_argument("--tokens", type=int, default=64, help="to continue each prompt by")
    given = flags.parse_args()
    text = pathlib.Path(given.text).read_text(encoding="utf-8")[: given.characters]
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 40]

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loaded = load_for_inference(given.model, mesh, dtype="float32")
    causal = loaded.model.config.causal
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    theirs = kind.from_pretrained(given.model, dtype=torch.float32).eval()
    result: dict[str, object] = {"model": os.path.basename(os.path.normpath(given.model))}
    with jax.set_mesh(mesh):
        if causal:
            ours, reference = perplexities(loaded, theirs, text, given.window)
            prompts = [" ".join(line.split()[:6]) for line in lines[: given.prompts]]
            same = same_continuations(loaded, theirs, prompts, given.tokens)
            result |= {
                "perplexity": ours,
                "perplexity_in_transformers": reference,
                "relative_difference": abs(ours / reference - 1),
                "same_continuations": same,
                "prompts": len(prompts),
            }
        else:
            texts = lines[: given.prompts]
            result["embedding_difference"] = embedding_difference(
                loaded, theirs, given.model, texts
            )
            result["texts"] = len(texts)
    for key, value in result.items():
        print(f"{key:<28} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
