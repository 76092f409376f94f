"""Every recipe in `configs/`: it validates, it builds and steps on a mesh, and has the published
number of parameters."""

import dataclasses
import pathlib

import commands
import jax
import jax.numpy as jnp
import pytest
from tiny_models import GEMMA, GPT2, LLAMA

from lm_jax.config import Config
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError
from lm_jax.model import flops, lora
from lm_jax.model import parameters as params_lib
from lm_jax.sharding.mesh import batch_sharding, make_mesh
from lm_jax.training.checkpoint import abstract_parameters
from lm_jax.training.masking import make_masking
from lm_jax.training.program import check_batch
from lm_jax.training.step import make_step, skeleton_of
from lm_jax.validation import validate

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# Recipe, variant -> (vocabulary, parameters). Sources: the weights published for GPT-2 (their state
# dictionaries without the masks), SmolLM2 and Llama; nanoGPT's own count for the characters, which
# leaves out positions (0.80M and 10.65M), with them added; what Transformers counts in
# BertForMaskedLM at the sizes of BERT (tiny has rotary positions instead of learned ones).
PUBLISHED = {
    ("shakespeare_char", "cpu"): (65, 795_904 + 64 * 128),
    ("shakespeare_char", "cpu_muon"): (65, 795_904 + 2 * 4 * 32),  # no positions, two QK-norms
    ("shakespeare_char", "gpu"): (65, 10_646_784 + 256 * 384),
    ("gpt2", "124m"): (50257, 124_439_808),
    ("gpt2", "355m"): (50257, 354_823_168),
    ("gpt2", "774m"): (50257, 774_030_080),
    ("gpt2", "1.5b"): (50257, 1_557_611_200),
    ("bert", "tiny"): (30522, 4_416_698 - 512 * 128),  # google/bert_uncased_L-2_H-128_A-2
    ("bert", "base"): (30522, 109_514_298),
    ("bert", "large"): (30522, 335_174_458),
    ("llama", "smollm2_135m"): (49152, 134_515_008),
    ("llama", "llama3_8b"): (128256, 8_030_261_248),
    ("llama", "llama3_70b"): (128256, 70_553_706_496),
    ("llama", "llama3_405b"): (128256, 405_853_388_800),
    ("mixtral", "8x7b"): (32000, 46_702_792_704),
    # The quickstart with as wide feed-forwards twice, and routers.
    ("mixtral", "tiny"): (2048, 3_738_368 + 4 * (3 * 256 * 704 + 256 * 4)),
}
# GPT-3's paper gives two or three digits, and its name for one size (350M) is not one of them.
NAMED = {
    ("gpt3", "125m"): 125e6,
    ("gpt3", "350m"): 356e6,
    ("gpt3", "760m"): 760e6,
    ("gpt3", "1.3b"): 1.3e9,
    ("gpt3", "2.7b"): 2.7e9,
    ("gpt3", "6.7b"): 6.7e9,
    ("gpt3", "13b"): 13e9,
    ("gpt3", "175b"): 175e9,
}
APPLICATIONS = [
    *(("translate", v) for v in ("cpu", "large", "tiny")),
    *(("sentiment", v) for v in ("scratch", "bert", "decoder", "tiny")),
    *(
        (r, v)
        for r in ("summarize", "answer", "instruct")
        for v in ("published", "scratch", "tiny")
    ),
    *(("answer", v) for v in ("extract", "extract_tiny")),
]
VARIANTS = [*PUBLISHED, *NAMED, *APPLICATIONS]
# Between the smallest and the largest, what is traced is the same at other sizes.
BETWEEN = {
    *((recipe, size) for recipe, size in NAMED if size not in ("125m", "175b")),
    *(("gpt2", size) for size in ("355m", "774m")),
    *(("llama", size) for size in ("llama3_8b", "llama3_70b")),
    ("bert", "base"),
}


def module(recipe: str):
    return commands.loaded(f"configs/{recipe}.py")


def configured(recipe: str, variant: str, vocab_size: int = 50257) -> Config:
    config = module(recipe).get_config(*[variant] if variant else [])
    if not config.data.sources:
        config.data.sources = ("corpus.txt",)
    config.model.vocab_size = vocab_size
    return validate(config)


def count(config: Config) -> int:
    return sum(x.size for x in params_lib.split(skeleton_of(config.model)).values())


def test_every_recipe_is_tested_in_every_variant():
    files = {path.stem for path in CONFIGS.glob("*.py")}
    assert files == {recipe for recipe, _ in VARIANTS} | {"quickstart", "finetune"}
    for recipe in files - {"quickstart", "finetune"}:
        assert {v for r, v in VARIANTS if r == recipe} == set(module(recipe)._VARIANTS)


@pytest.mark.parametrize("recipe, variant", PUBLISHED)
def test_number_of_parameters_is_the_published_one(recipe, variant):
    vocab_size, parameters = PUBLISHED[recipe, variant]
    assert count(configured(recipe, variant, vocab_size)) == parameters


def test_the_parameters_that_work_for_a_token_are_the_published_ones():
    config = configured("mixtral", "8x7b", 32000)
    active = count(config) - flops.idle_parameters(config.model)
    assert active == pytest.approx(12.9e9, rel=0.005)  # "13B": Jiang et al. 2024, section 1


@pytest.mark.parametrize("recipe, variant", NAMED)
def test_number_of_parameters_is_the_named_one(recipe, variant):
    assert count(configured(recipe, variant)) == pytest.approx(NAMED[recipe, variant], rel=0.02)


def on_its_mesh(recipe: str, variant: str) -> tuple[Config, jax.sharding.Mesh]:
    config = configured(recipe, variant, vocab_size=50304)
    if config.data.batch_size % 8:  # written for one device
        config.mesh.data = 1
    devices = None if config.data.batch_size % 8 == 0 else jax.devices()[:1]
    return config, make_mesh(config.mesh, devices)


@pytest.mark.parametrize("recipe, variant", [("quickstart", ""), *VARIANTS])
def test_its_mesh_divides_it(recipe, variant):
    config, mesh = on_its_mesh(recipe, variant)
    check_batch(config, mesh)  # these raise otherwise
    abstract_parameters(skeleton_of(config.model), mesh)


TRACED = [v for v in (("quickstart", ""), *VARIANTS) if v not in BETWEEN]


@pytest.mark.parametrize("recipe, variant", TRACED)
def test_a_step_of_it_traces_on_its_mesh(recipe, variant):
    config, mesh = on_its_mesh(recipe, variant)
    with jax.set_mesh(mesh):
        masking = make_masking(config.data, BytesTokenizer(mask=True), config.model.vocab_size)
        step = make_step(config, masking)
        state = jax.eval_shape(step.init)
        shape = config.data.batch_size, config.data.length
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
            for name, dtype in {
                "inputs": jnp.int32,
                "targets": jnp.int32,
                "weights": jnp.float32,
                "segments": jnp.int32,
                "positions": jnp.int32,
            }.items()
        }
        after, metrics = jax.eval_shape(step.train, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("recipe", ["shakespeare_char", "gpt2", "gpt3", "llama"])
def test_without_text_it_says_which_key_is_missing(recipe):
    with pytest.raises(UserError, match=r"data\.sources: name at least one file"):
        validate(module(recipe).get_config())


@pytest.mark.parametrize("variant", ["full", "lora"])
@pytest.mark.parametrize("shape", [GPT2, LLAMA, GEMMA], ids=["gpt2", "llama", "gemma"])
def test_fine_tuning_takes_whatever_shape_comes_with_the_weights(variant, shape):
    config = module("finetune").get_config(variant)
    config.model = dataclasses.replace(shape, lora=config.model.lora, max_length=512)
    config.init_from, config.data.sources = "published", ("corpus.txt",)
    step = make_step(validate(config))
    state = jax.eval_shape(step.init)
    projections = {n.rpartition(".")[2] for n in state.all_parameters if n.startswith("blocks.")}
    adapted = {n.split(".")[-2] for n in state.parameters if lora.is_adapter(n)}
    if variant == "full":
        assert not state.frozen and not adapted
    else:
        wanted = projections & {"query", "key", "value", "out", "up", "gate", "down"}
        assert adapted == {f"{name}_lora" for name in wanted} and len(wanted) >= 6
        assert len(state.parameters) == 2 * len(wanted)


def test_tokens_of_gpt3_are_those_of_the_paper():
    for recipe, variant in NAMED:
        config = configured(recipe, variant)
        tokens = config.data.batch_size * config.data.length
        optimizer = config.optimizer
        assert config.training.steps * tokens == pytest.approx(300e9, rel=1e-3)
        assert optimizer.decay_steps * tokens == pytest.approx(260e9, rel=1e-3)
        assert optimizer.warmup_steps * tokens == pytest.approx(375e6, rel=0.02)


@pytest.mark.parametrize(
    "recipe, given, meant",
    [
        ("gpt2", "124", "124m"),
        ("gpt2", "1.5B", "1.5b"),
        ("gpt3", "175", "175b"),
        ("bert", "bse", "base"),
        ("llama", "smollm2-135m", "smollm2_135m"),
        ("llama", "llama3_7b", "llama3_70b"),
        ("shakespeare_char", "gpus", "gpu"),
    ],
)
def test_unknown_variant_names_the_nearest_and_lists_all(recipe, given, meant):
    with pytest.raises(UserError) as caught:
        module(recipe).get_config(given)
    message = str(caught.value)
    assert f"no variant '{given}'; did you mean '{meant}'?" in message
    assert all(variant in message for r, variant in VARIANTS if r == recipe)


def test_a_variant_like_none_of_them_is_not_guessed():
    with pytest.raises(UserError, match=r"no variant 'xyz' \(it has 124m, 355m, 774m, 1\.5b\)"):
        module("gpt2").get_config("xyz")
