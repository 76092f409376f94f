"""A look inside a model: python -m lm_jax.inspect --model=DIR --prompt='...' --output=page.html

Writes one HTML file that shows the prompt's tokens with their losses and what the model expected in
their place, each head's attention, and what each layer would have predicted.
"""

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_STEP = flags.DEFINE_integer("step", None, "Of a run, which checkpoint; default: the newest.")
_DTYPE = cli.define_dtype_flag()
_PROMPT = flags.DEFINE_string(
    "prompt", None, "What the model reads. For a masked model, [MASK] in it hides a token."
)
_CONTINUATION = flags.DEFINE_string(
    "continuation", "", "What follows the prompt, encoded by itself: an answer to look at, say."
)
_CHAT = flags.DEFINE_bool(
    "chat", False, "The prompt is what a user says, in the model's chat template."
)
_SPECIAL_TOKENS = flags.DEFINE_bool(
    "special_tokens",
    False,
    "Special tokens are read out of the text where their names stand, as --chat does; then nothing"
    " is added around it.",
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "A longer text is refused.", 1)
_TOP_K = flags.DEFINE_integer("top_k", 10, "Candidates to show for each token.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "A new file, .html.")


def main(argv: list[str]) -> None:
    del argv
    path, output = cli.model_of(_MODEL), _OUTPUT.value
    if not _PROMPT.value:
        raise UserError("which text is the model to read? give --prompt='...'")
    if not output:
        raise UserError("where is the page to go? give --output=FILE.html")
    cli.check_new_file("output", output)

    with cli.importing():
        import jax

        from lm_jax import runtime
        from lm_jax.config import MeshConfig
        from lm_jax.inspection.look import look
        from lm_jax.inspection.page import render
        from lm_jax.inspection.prompt import check, encode
        from lm_jax.model.parameters import split
        from lm_jax.sharding.mesh import make_mesh
        from lm_jax.training.inference import load_for_inference
    runtime.configure()

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loaded = load_for_inference(path, mesh, _STEP.value, _DTYPE.value)
    config, tokenizer, step = loaded.model.config, loaded.tokenizer, loaded.source.step
    ids_T, size = encode(
        config,
        tokenizer,
        _PROMPT.value,
        continuation=_CONTINUATION.value,
        special_tokens=_SPECIAL_TOKENS.value,
        chat=loaded.config.data.objective if _CHAT.value else None,
    )
    check(config, tokenizer, ids_T, _MAX_TOKENS.value)
    with jax.set_mesh(mesh):
        seen = look(loaded.model, tokenizer, ids_T, prompt=size, top_k=_TOP_K.value)
    facts = {
        "model": path,
        "parameters": f"{sum(x.size for x in split(loaded.model).values()):,}",
        "step": "none, a published model" if step is None else f"{step:,}",
        "dtype": config.dtype,
        "shape": f"{config.layers} layers of {config.heads} heads",
        "prompt": f"{size} tokens" + ", read both ways" * (seen.prefix > 1),
    }
    if size < len(ids_T):
        facts["continuation"] = f"{len(ids_T) - size} tokens"
    with open(output, "x", encoding="utf-8") as f:
        f.write(render(seen, tokenizer, facts))
    print(f"wrote {output}: open it in a browser")


if __name__ == "__main__":
    cli.run(main)
