"""CrowS-Pairs here and by Transformers alone, both in float32: do they agree?

    python tests/benchmarks/fairness.py --model=DIR --source=crows_pairs_anonymized.csv

Needs torch and transformers (the `test` extra). Transformers scores one sentence at a time, and of
a masked model one masked token at a time. Prints a table and a JSON line; exits with 1 if a
sentence's score differs by more than 0.01 nats.

Seen on two CPU cores, of all pairs (`--pairs=1508`):

| model | here | Transformers | pairs with the same preference | largest difference |
|---|---|---|---|---|
| SmolLM2-135M-Instruct | 55.57 | 55.57 | 1508 | 0.0019 nats |
"""

import argparse
import csv
import difflib
import itertools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

import jax
import torch
import transformers

from lm_jax.config import MeshConfig
from lm_jax.evaluation.crows_pairs import crows_pairs, read_pairs
from lm_jax.generation.scoring import Scorer
from lm_jax.sharding.mesh import make_mesh
from lm_jax.training.inference import load_for_inference


def reference(folder: str, *, causal: bool) -> Callable[[str, str], tuple[float, float]]:
    """Two sentences -> the score of each, in nats."""
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def log_p(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def of_text(text: str) -> float:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        ids = [first, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        found = log_p(ids[:-1])
        return sum(found[k, i].item() for k, i in enumerate(ids[1:]))

    def of_tokens(ids: list[int], places: list[int]) -> float:
        total = 0.0
        for place in places:
            masked = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
            total += log_p(masked)[place, ids[place]].item()
        return total

    def of_shared(a: str, b: str) -> tuple[float, float]:
        sides = tokenizer(a)["input_ids"], tokenizer(b)["input_ids"]
        matcher = difflib.SequenceMatcher(None, *([str(i) for i in ids] for ids in sides))
        equal = [op for op in matcher.get_opcodes() if op[0] == "equal"]
        places = (
            [p for op in equal for p in range(op[1], op[2])],
            [p for op in equal for p in range(op[3], op[4])],
        )
        # The first and the last token, [CLS] and [SEP], are not scored.
        return tuple(of_tokens(ids, found[1:-1]) for ids, found in zip(sides, places))

    return (lambda a, b: (of_text(a), of_text(b))) if causal else of_shared


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a Hugging Face folder")
    flags.add_argument("--source", required=True, help="the authors' CSV file")
    flags.add_argument("--pairs", type=int, default=200, help="of them, from the beginning")
    given = flags.parse_args()

    with open(given.source, encoding="utf-8", newline="") as f:
        rows = list(itertools.islice(csv.DictReader(f), given.pairs))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loaded = load_for_inference(given.model, mesh, dtype="float32")
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        part = pathlib.Path(folder) / "pairs.csv"
        with part.open("w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        ours = crows_pairs(
            Scorer(loaded.model, loaded.tokenizer, batch_size=16), read_pairs(str(part))
        )

    score = reference(given.model, causal=loaded.model.config.causal)
    theirs = [score(row["sent_more"], row["sent_less"]) for row in rows]
    preferred = [round(more, 3) > round(less, 3) for more, less in theirs]
    result = {
        "model": os.path.basename(os.path.normpath(given.model)),
        "method": ours.method,
        "pairs": len(rows),
        "score": ours.summary()["score"],
        "score_in_transformers": 100 * sum(preferred) / len(rows),
        "same_preference": sum((s.prefers == "more") == p for s, p in zip(ours.scores, preferred)),
        "largest_difference": max(
            max(abs(s.score_more - more), abs(s.score_less - less))
            for s, (more, less) in zip(ours.scores, theirs)
        ),
    }
    for key, value in result.items():
        print(f"{key:<24} {value}")
    print(json.dumps(result))
    return int(result["largest_difference"] > 0.01)


if __name__ == "__main__":
    sys.exit(main())
