"""Answers of a published model that chats, here and by Transformers alone, both in float32: do the
scores agree?

    python tests/benchmarks/applications.py --model=DIR --task=summarize --source=dialogues.jsonl
    python tests/benchmarks/applications.py --model=DIR --task=answer --source=questions.json

Needs torch and transformers (the `test` extra). Transformers makes its prompts with its own chat
template and answers them one at a time, greedily. Prints a table and a JSON line; exits with 1 if
more than one answer in twenty differs (near a tie, rounding decides).

Seen on two CPU cores, SmolLM2-135M-Instruct as it is published:

| task | examples | same answers | score | here | Transformers | seconds | Transformers |
|---|---|---|---|---|---|---|---|
| summarize | DialogSum dev, the first 100 | 100 | ROUGE-L | 15.94 | 15.94 | 253 | 325 |
| answer | XQuAD en, the first 200 | 200 | F1 | 10.43 | 10.43 | 129 | 183 |
| | | | exact match | 0 | 0 | | |
"""

import argparse
import json
import os
import sys
import time

import jax
import torch
import transformers

from lm_jax.applications import find
from lm_jax.evaluation.metrics import score
from lm_jax.evaluators.application import evaluate_task
from lm_jax.evaluators.models import ModelOptions


def reference(folder: str, prompts: list[str], max_tokens: int) -> list[str]:
    """What Transformers answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    out = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            found = model.generate(torch.tensor([ids]), generation_config=greedy)[0]
        out.append(tokenizer.decode(found[len(ids) :], skip_special_tokens=True).strip())
    return out


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a Hugging Face folder")
    flags.add_argument("--task", required=True, choices=("summarize", "answer"))
    flags.add_argument("--source", required=True, help="the file of examples")
    flags.add_argument("--examples", type=int, default=100, help="of them, from the beginning")
    flags.add_argument("--max_tokens", type=int, help="of an answer")
    given = flags.parse_args()

    max_tokens = given.max_tokens or find(given.task).max_tokens
    began = time.perf_counter()
    report, result = evaluate_task(
        given.model,
        given.task,
        ModelOptions(dtype="float32"),
        sources=(given.source,),
        max_examples=given.examples,
        max_tokens=max_tokens,
    )
    seconds = time.perf_counter() - began
    ours = [r["prediction"] for r in result.records]
    began = time.perf_counter()
    theirs = reference(given.model, [r["prompt"] for r in result.records], max_tokens)
    names = find(given.task).metrics
    references = [[t.strip() for t in r["references"]] for r in result.records]
    beside = score(names, theirs, references)
    out = {
        "model": os.path.basename(os.path.normpath(given.model)),
        "task": given.task,
        "examples": len(ours),
        "same_answers": sum(a == b for a, b in zip(ours, theirs)),
        "seconds": round(seconds, 1),
        "seconds_in_transformers": round(time.perf_counter() - began, 1),
        "device": jax.devices()[0].device_kind,
    }
    for name in names:
        out[name] = round(report["scores"][name]["value"], 2)
        out[f"{name}_in_transformers"] = round(beside[name].value, 2)
    for key, value in out.items():
        print(f"{key:<28} {value}")
    print(json.dumps(out))
    return int(out["same_answers"] < 0.95 * len(ours))


if __name__ == "__main__":
    sys.exit(main())
