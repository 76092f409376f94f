"""Each job ends as if it were alone, whatever runs beside it, and gives its row back."""

import dataclasses
import queue
import time

import jax
import numpy as np
import pytest
from tiny_generation import LetterTokenizer, on_mesh
from tiny_serving import model_of, until

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Completion, Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.serving import batch as batch_lib
from lm_jax.serving.scheduler import Closed, Failed, Full, Scheduler, TimedOut
from lm_jax.sharding.mesh import make_mesh

KINDS = (Sampling(0.0), Sampling(top_k=0), Sampling(0.7, top_k=20, top_p=0.8))


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def tokenizer():
    return LetterTokenizer()


@pytest.fixture
def make(model, tokenizer):
    made = []

    def start(**arguments) -> Scheduler:
        arguments = {"slots": 4, "waiting": 100} | arguments
        made.append(Scheduler(arguments.pop("model", model), tokenizer, **arguments))
        return made[-1]

    yield start
    for scheduler in made:
        scheduler.close(0)


def ask(scheduler: Scheduler, prompt="aa", **arguments) -> tuple:
    """A submitted job, and the queue of what it tells."""
    told = queue.SimpleQueue()
    arguments = {"max_tokens": 100, "sampling": KINDS[1], "seed": 0} | arguments
    job = scheduler.job(prompt, told.put, **arguments)
    scheduler.submit([job])
    return job, told


def end(told: queue.SimpleQueue) -> Completion | Exception:
    parts = []
    while isinstance(event := told.get(timeout=60), str):
        parts.append(event)
    assert not isinstance(event, Completion) or "".join(parts) == event.text
    return event


def requests(count: int) -> list[dict]:
    """Prompts, lengths and sampling of many kinds; no two alike."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": "".join(rng.choice(["aa", "ba", "cb"], rng.integers(0, 31))),
            "max_tokens": int(rng.integers(1, 159)),
            "sampling": KINDS[i % 3],
            "seed": int(rng.integers(2**32)),
            "stop": ("zz", "d") if i % 4 == 0 else (),
        }
        for i in range(count)
    ]


def alone(model, tokenizer, request: dict) -> Completion:
    """What the generator makes of it by itself, always of one size, so that it compiles once."""
    arguments = {k: request[k] for k in ("sampling", "seed", "stop")}
    whole = Generator(model, tokenizer).generate([request["prompt"]], max_tokens=159, **arguments)
    tokens = whole[0].tokens[: request["max_tokens"]]
    if len(tokens) == len(whole[0].tokens):
        return whole[0]
    return dataclasses.replace(
        whole[0], text=tokenizer.decode(tokens), tokens=tokens, finish_reason="length"
    )


def test_many_at_once_end_as_each_would_alone(make, model, tokenizer, monkeypatch):
    """And the batch grows, shrinks and changes hands on the way."""
    monkeypatch.setattr(batch_lib, "_PATIENCE", 3)
    sizes, resize = set(), batch_lib.Batch._resize

    def noted(self, *arguments):
        resize(self, *arguments)
        sizes.add((len(self._places), self._slots))

    monkeypatch.setattr(batch_lib.Batch, "_resize", noted)
    asked = requests(20)
    scheduler, told = make(), []
    for i, request in enumerate(asked):
        told.append(ask(scheduler, **request)[1])
        if i % 6 == 5:
            end(told[i - 3])  # they come in waves
            told[i - 3] = None
    got = [heard and end(heard) for heard in told]
    wanted = [alone(model, tokenizer, request) for request in asked]
    assert [g for g in got if g] == [w for w, g in zip(wanted, got) if g]
    assert {c.finish_reason for c in wanted} == {"eos", "stop", "length"}
    assert scheduler.counts() == (0, 0)
    assert sizes == {(1, 128), (4, 128), (1, 160), (4, 160)}


def test_on_a_mesh(make, model, tokenizer):
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    scheduler = make(model=on_mesh(model, mesh), mesh=mesh)
    request = requests(2)[1] | {"max_tokens": 60}
    assert end(ask(scheduler, **request)[1]) == alone(model, tokenizer, request)


def test_a_prompt_may_be_ids(make):
    scheduler = make()
    _, told = ask(scheduler, np.array([98, 1], np.int32))
    _, same = ask(scheduler, "ba")  # behind bos
    assert end(told).tokens == end(same).tokens


def test_one_that_is_cancelled_frees_its_row(make):
    scheduler = make(slots=1, waiting=1)
    first, told = ask(scheduler, sampling=KINDS[0], max_tokens=158)
    told.get(timeout=60)
    second, waits = ask(scheduler, max_tokens=1)
    with pytest.raises(Full):
        ask(scheduler)
    first.cancel()
    assert isinstance(end(waits), Completion)
    until(lambda: scheduler.counts() == (0, 0))
    assert len(first.row.tokens) < 158
    second, _ = ask(scheduler, max_tokens=158)
    third, _ = ask(scheduler)
    third.cancel()  # while it waits
    second.cancel()
    until(lambda: scheduler.counts() == (0, 0))
    assert third.row.tokens == []


def test_time_that_is_up_ends_it(make):
    scheduler = make(slots=1)
    _, told = ask(scheduler, max_tokens=158, deadline=time.monotonic() - 1)
    assert isinstance(end(told), TimedOut)


def test_all_of_a_request_or_none(make):
    scheduler = make(slots=1, waiting=1)
    told = queue.SimpleQueue()
    jobs = [
        scheduler.job("aa", told.put, max_tokens=2, sampling=KINDS[0], seed=0) for _ in range(3)
    ]
    with pytest.raises(Full):
        scheduler.submit(jobs)
    assert scheduler.counts() == (0, 0)
    scheduler.submit(jobs[:2])
    assert isinstance(end(told), Completion) and isinstance(end(told), Completion)


def test_one_of_many_prompts_does_not_keep_others_waiting(make, monkeypatch):
    scheduler = make(slots=2)
    begun, add = [], batch_lib.Batch.add
    monkeypatch.setattr(
        batch_lib.Batch, "add", lambda self, entry: (begun.append(entry.seed), add(self, entry))[1]
    )
    told = queue.SimpleQueue()

    def jobs(*seeds: int) -> list:
        kinds = {"sampling": KINDS[0], "max_tokens": 20}
        return [scheduler.job("aa", told.put, seed=seed, **kinds) for seed in seeds]

    with scheduler._changed:  # all of them wait before the first begins
        for each in (jobs(0, 1, 2, 3, 4, 5), jobs(10), jobs(20, 21)):
            scheduler.submit(each)
    until(lambda: scheduler.counts() == (0, 0))
    assert begun[:2] == [0, 10] and begun.index(21) < begun.index(4)
    assert [seed for seed in begun if seed < 10] == [0, 1, 2, 3, 4, 5]


def test_closing_lets_what_runs_end(make):
    scheduler = make(slots=1)
    _, told = ask(scheduler, sampling=KINDS[0], max_tokens=30, stop=("zzzz",))
    told.get(timeout=60)
    _, waits = ask(scheduler)
    scheduler.close(60)
    assert isinstance(end(waits), Closed)
    while isinstance(event := told.get(timeout=60), str):
        pass
    assert isinstance(event, Completion)
    with pytest.raises(Closed):
        ask(scheduler)


def test_a_defect_ends_what_runs_and_not_the_scheduler(make, monkeypatch, capsys):
    scheduler = make()
    step = batch_lib.Batch.step

    def fails(self):
        monkeypatch.setattr(batch_lib.Batch, "step", step)
        raise MemoryError("no memory")

    monkeypatch.setattr(batch_lib.Batch, "step", fails)
    assert isinstance(end(ask(scheduler)[1]), Failed)
    assert isinstance(end(ask(scheduler)[1]), Completion)
    assert "no memory" in capsys.readouterr().err


def test_bad_arguments(make):
    scheduler = make(max_length=40)
    with pytest.raises(UserError, match=r"it has 40 tokens, .* may have 40"):
        ask(scheduler, "aa" * 39)
    for wrong in (100, -1):  # the model has 300, the tokenizer these
        with pytest.raises(UserError, match=f"{wrong} is no token of this model: ids are from 0"):
            ask(scheduler, np.array([3, wrong], np.int32))
    with pytest.raises(UserError, match="it is empty"):
        ask(scheduler, np.zeros(0, np.int32))
    with pytest.raises(UserError, match="max_length: must be from 2 to the model's 160, not 161"):
        make(max_length=161)
    assert len(end(ask(scheduler, "aa" * 37, sampling=KINDS[0])[1]).tokens) <= 2
