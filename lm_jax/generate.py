"""Continues prompts with a trained or published model: python -m lm_jax.generate --model=DIR"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from contextlib import nullcontext

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

MODEL = cli.define_model_flag()
STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.", lower_bound=0)
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue; may be repeated. Default: none, the model begins a document."
)
PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "More prompts: one a line, or (.jsonl) objects with the key 'prompt'."
)
CHAT = flags.DEFINE_bool(
    "chat", False, "Answer what a user says, each prompt by itself, in the model's chat template."
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "The most to generate a prompt.", 1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0: always the most probable token.")
TOP_K = flags.DEFINE_integer("top_k", 50, "Draw from the so many most probable tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the fewest tokens of this mass; 1: all.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Draw from tokens this probable next to the best; 0: all.")
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1: tokens that were there before become less probable."
)
STOP = flags.DEFINE_multi_string("stop", [], r"Ends the text; may be repeated. \n is a line end.")
SEED = flags.DEFINE_integer("seed", 0, "The same draws the same.", 0, 2**32 - 1)
BEAMS = flags.DEFINE_integer(
    "beams", None, "Draw nothing: search for a probable text, so many candidates at a time.", 1
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "With --beams: the more, the longer the text; 0: sums count."
)
DTYPE = cli.define_dtype_flag()
QUANTIZE = cli.define_quantize_flag()
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts at a time.", 1)
TENSOR = flags.DEFINE_integer("tensor", 1, "Devices to split the model over.", 1)
OUTPUT = flags.DEFINE_string("output", None, "A new file for the results, as JSON lines.")
STREAM = flags.DEFINE_bool(
    "stream", None, "Show text while it is generated; default: for one prompt and no --output."
)


def main(argv: list[str]) -> None:
    del argv
    path = cli.model_of(MODEL)
    from lm_jax.generation.prompts import as_questions, read_prompts
    from lm_jax.generation.sampling import Sampling

    search = _beam_search()
    sampling = Sampling(
        TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, REPETITION_PENALTY.value
    ).validate()
    prompts = PROMPT.value + (read_prompts(PROMPT_FILE.value) if PROMPT_FILE.value else [])
    if CHAT.value and not prompts:
        raise UserError("--chat: what does the user say? give --prompt='...'")
    prompts = prompts or [""]
    stream = STREAM.value
    if stream is None:
        stream = len(prompts) == 1 and not OUTPUT.value and search is None
    if stream and len(prompts) > 1:
        raise UserError(f"--stream shows one prompt at a time, and there are {len(prompts)}")
    if OUTPUT.value:
        cli.check_new_file("output", OUTPUT.value)
    with cli.importing():
        import jax

        from lm_jax import runtime
        from lm_jax.config import MeshConfig
        from lm_jax.generation.decoding import Generator
        from lm_jax.progress import progress
        from lm_jax.sharding.mesh import make_mesh
        from lm_jax.training.inference import load_for_inference
    runtime.configure()

    if TENSOR.value > jax.device_count():
        raise UserError(f"--tensor={TENSOR.value}: this machine has {jax.device_count()} device(s)")
    mesh = make_mesh(MeshConfig(data=1, tensor=TENSOR.value), jax.devices()[: TENSOR.value])
    loaded = load_for_inference(path, mesh, STEP.value, DTYPE.value, QUANTIZE.value)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows '?'
    generator = Generator(loaded.model, loaded.tokenizer, donate=True)
    asked = prompts
    if CHAT.value:
        asked = as_questions(prompts, loaded.tokenizer, loaded.config.data.objective)
    else:
        _warn_of_specials(prompts, loaded.tokenizer.specials.values())
        if stream:
            print(prompts[0], end="", flush=True)
    several = progress("prompts", len(prompts)) if len(prompts) > 1 else nullcontext()
    with jax.set_mesh(mesh), several as count:
        common = {
            "max_tokens": MAX_TOKENS.value,
            "on_done": count,
            "batch_size": BATCH_SIZE.value,
        }
        if search is not None:
            completions = generator.beam_search(asked, **search, **common)
        else:
            completions = generator.generate(
                asked,
                sampling=sampling,
                seed=SEED.value,
                stop=[_unescaped(s) for s in STOP.value],
                on_text=(lambda row, text: print(text, end="", flush=True)) if stream else None,
                **common,
            )
    if CHAT.value:  # without what the template wrote
        completions = [dataclasses.replace(c, prompt=p) for c, p in zip(completions, prompts)]
    if stream:
        print()
    if OUTPUT.value:
        with open(OUTPUT.value, "x", encoding="utf-8") as f:
            for c in completions:
                f.write(json.dumps(dataclasses.asdict(c), ensure_ascii=False) + "\n")
        print(f"wrote {len(completions)} completion(s) to {OUTPUT.value}", file=sys.stderr)
    elif not stream:
        texts = [c.text if CHAT.value else c.prompt + c.text for c in completions]
        print(f"\n{'-' * 40}\n".join(texts))


def _beam_search() -> dict[str, int | float] | None:
    """What to search for; None: nothing, tokens are drawn.

    Raises:
      UserError: it is out of range, or another flag says something that a search does not do.
    """
    if BEAMS.value is None:
        if flags.FLAGS[LENGTH_PENALTY.name].present:
            raise UserError("--length_penalty is of a search: give --beams too, or leave it out")
        return None
    drawing = TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, SEED
    for flag in (*drawing, STOP, STREAM):
        if flags.FLAGS[flag.name].present and flag.value is not False:
            why = {STOP.name: "knows no stop strings", STREAM.name: "has no text before its end"}
            raise UserError(
                f"--{flag.name} does not go with --beams={BEAMS.value}: a search"
                f" {why.get(flag.name, 'draws nothing')}; leave one of them out"
            )
    from lm_jax.generation.beam import BeamSearch

    settings = BeamSearch(BEAMS.value, LENGTH_PENALTY.value).validate()
    return {"beams": settings.beams, "length_penalty": settings.length_penalty}


def _warn_of_specials(prompts: list[str], names: Iterable[str]) -> None:
    found = next((n for n in names if len(n) > 1 and any(n in p for p in prompts)), None)
    if found:
        print(
            f"note: '{found}' in a prompt is spelled as text; special tokens are not read there",
            file=sys.stderr,
        )


def _unescaped(text: str) -> str:
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\(.)", lambda m: known.get(m[1], m[0]), text)


if __name__ == "__main__":
    cli.run(main)
