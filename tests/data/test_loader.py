"""The stream depends on the config and the seed: on no host, worker, restart or read-ahead."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    NumbersTokenizer,
    assert_same,
    data_config,
    joined,
    jsonl,
    numbered_documents,
    targets,
)

from lm_jax.data.loader import train_stream
from lm_jax.errors import Interrupted, UserError

LENGTHS = [3, 30, 1, 8, 9, 2, 17, 5, 12, 7, 40, 11, 6]
TOKENIZER = NumbersTokenizer(eos_id=3)
KINDS = {
    "first_fit": {},
    "first_fit, in order": {"shuffle": False},
    "concatenate": {"packing": "concatenate"},
    "crop": {"packing": "crop", "epochs": None},
    "mixture": {"weights": (0.75, 0.25), "epochs": None},
    "masked": {"objective": "masked"},
    "masked, crop": {"objective": "masked", "packing": "crop", "epochs": None},
}


@pytest.fixture(params=KINDS)
def config(request, tmp_path):
    a = jsonl(tmp_path / "a.jsonl", numbered_documents(LENGTHS))
    b = jsonl(tmp_path / "b.jsonl", numbered_documents(LENGTHS, first=100_000))
    return data_config(a, b, **KINDS[request.param])


def run(config, count=12, state=None, **where):
    """Up to `count` batches and the state before each, as JSON would give it back."""
    batches, states = [], []
    with train_stream(config, TOKENIZER, seed=5, **where) as stream:
        if state is not None:
            stream.set_state(state)
        states.append(json.loads(json.dumps(stream.get_state())))
        for batch in itertools.islice(stream, count):
            batches.append(batch)
            states.append(json.loads(json.dumps(stream.get_state())))
    return batches, states


def test_resumes_at_every_position(config):
    batches, states = run(config)
    assert len(batches) > 3
    assert max(len(json.dumps(state)) for state in states) < 2000
    for k, state in enumerate(states):
        rest, _ = run(config, count=len(batches) - k, state=state)
        assert len(rest) == len(batches) - k
        for a, b in zip(batches[k:], rest, strict=True):
            assert_same(a, b)


def test_a_used_stream_can_be_set_back(config):
    batches, states = run(config)
    with train_stream(config, TOKENIZER, seed=5) as stream:
        for _ in range(3):
            next(stream)
        for k in (2, 0, 1):
            stream.set_state(states[k])
            assert_same(batches[k], next(stream))
            assert stream.get_state() == states[k + 1]


def test_an_ended_stream_stays_ended(tmp_path):
    config = data_config(jsonl(tmp_path / "a.jsonl", numbered_documents(LENGTHS)))
    _, states = run(config, count=100)
    assert run(config, state=states[-1])[0] == []


def test_processes_share_the_global_batch(config):
    whole, states = run(config, count=6)
    for count in (2, 4):
        parts = [run(config, count=6, process_index=i, process_count=count) for i in range(count)]
        for k, batch in enumerate(whole):
            assert_same(batch, joined([batches[k] for batches, _ in parts]))
        merged = {}
        for _, part_states in parts:
            merged |= part_states[3]
        assert merged == states[3]
    # The states of four processes, taken up by two and by one.
    resumed = [
        run(config, count=3, state=merged, process_index=i, process_count=2)[0] for i in range(2)
    ]
    alone, _ = run(config, count=3, state=merged)
    for k in range(3):
        assert_same(whole[3 + k], joined([batches[k] for batches in resumed]))
        assert_same(whole[3 + k], alone[k])


def test_workers_change_nothing(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", numbered_documents(LENGTHS))
    config = data_config(a, packing="concatenate")
    whole, states = run(config, count=100)
    config.workers = 2
    batches, worker_states = run(config, count=100)
    assert worker_states == states
    for x, y in zip(whole, batches, strict=True):
        assert_same(x, y)
    config.workers = 1
    resumed, _ = run(config, count=2, state=states[3])
    for x, y in zip(whole[3:5], resumed, strict=True):
        assert_same(x, y)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_surfaces_with_its_place(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    jsonl(path, numbered_documents([5] * 8))
    path.write_text(path.read_text() + '{"text": 3}\n')
    config = data_config(str(path), workers=workers)
    with pytest.raises(UserError, match=r"a\.jsonl:9: 'text' must be a string, not a number"):
        list(train_stream(config, TOKENIZER, seed=0))
    assert multiprocessing.active_children() == []
    config.on_error, config.workers = "skip", 0
    assert sum(targets(train_stream(config, TOKENIZER, seed=0)).values()) == 8 * 6


def test_a_worker_that_is_killed_is_told(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents([50] * 8))
    config = data_config(path, epochs=None, workers=1)
    with train_stream(config, NumbersTokenizer(eos_id=3), seed=0) as stream:
        before = next(stream)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(Interrupted, match="a worker process was killed"):
            list(itertools.islice(stream, 100))
        stream.set_state({str(lane): None for lane in range(config.lanes)})
        assert_same(before, next(stream))


def test_seeds_and_epochs_differ(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents([9] * 16))
    config = data_config(path, lanes=1, batch_size=1, packing="concatenate", epochs=2)

    def order(seed):
        # A document is 10 targets; the first token of each, in the order of reading.
        text = np.concatenate([b["targets"][0] for b in train_stream(config, TOKENIZER, seed=seed)])
        firsts = [int(t) for t in text if t and t % 1000 == 0]
        return firsts[:16], firsts[16:]

    first, second = order(0)
    assert sorted(first) == sorted(second) == [1000 * (i + 1) for i in range(16)]
    assert len({tuple(o) for seed in (0, 1) for o in order(seed)}) == 4
    config.shuffle = False
    assert order(0) == (sorted(first), sorted(first))


def test_weights_are_shares_of_the_documents_in_every_lane(tmp_path):
    # Documents of one source are far longer: were sources dealt to lanes, shares would be off.
    a = jsonl(tmp_path / "a.jsonl", numbered_documents([40] * 5))
    b = jsonl(tmp_path / "b.jsonl", numbered_documents([4] * 7, first=100_000))
    config = data_config(a, b, weights=(1.0, 1.0), epochs=None, lanes=2, packing="concatenate")
    batches = list(itertools.islice(train_stream(config, NumbersTokenizer(), seed=0), 60))
    for lane in range(2):
        rows = [batch["targets"][lane * 4 : lane * 4 + 4] for batch in batches]
        tokens = np.concatenate(rows).ravel()
        share = (tokens < 100_000).sum() / 39 / ((tokens >= 100_000).sum() / 3)
        assert 0.9 < share < 1.1


def test_more_lanes_than_documents(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents([20, 5]))
    config = data_config(path, lanes=8, epochs=None)
    for batch in itertools.islice(train_stream(config, TOKENIZER, seed=0), 5):
        assert batch["weights"].any(axis=1).all()
    config.epochs = 1
    assert sum(targets(train_stream(config, TOKENIZER, seed=0)).values()) == 21 + 6


def test_processes_that_end_at_different_times_yield_padding(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents([50, 2, 50, 2]))
    config = data_config(path, lanes=4, batch_size=4, shuffle=False)
    streams = [
        train_stream(config, TOKENIZER, seed=0, process_index=i, process_count=4) for i in range(4)
    ]
    rounds = []
    while True:
        batches = [next(stream) for stream in streams]
        if all(stream.exhausted for stream in streams):
            break
        rounds.append(joined(batches))
        assert [s.exhausted for s in streams] == [not b["weights"].any() for b in batches]
    for stream in streams:
        stream.close()
    assert len(rounds) > 3
    for a, b in zip(rounds, run(config, count=100)[0], strict=True):
        assert_same(a, b)


def test_lanes_that_do_not_fit_are_an_error(tmp_path):
    config = data_config(jsonl(tmp_path / "a.jsonl", numbered_documents([20, 5])))
    with pytest.raises(UserError, match="3 processes cannot share 4 lanes"):
        train_stream(config, TOKENIZER, seed=0, process_index=0, process_count=3)
    stream = train_stream(config, TOKENIZER, seed=0)
    with pytest.raises(UserError, match=r"data\.lanes = 4, but .* that of 2 lanes"):
        stream.set_state({"0": None, "1": None})
    with pytest.raises(UserError, match=r"data\.lanes = 4, but .* that of 8 lanes"):
        stream.set_state({str(lane): None for lane in range(8)})


SCRIPT = """
import multiprocessing, os, signal, sys
from data_helpers import NumbersTokenizer, data_config
from lm_jax.data.loader import train_stream
if __name__ == "__main__":
    config = data_config(sys.argv[1], epochs=None, workers=1)
    stream = train_stream(config, NumbersTokenizer(eos_id=3), seed=0)
    next(stream)
    print(*(p.pid for p in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["returns", "killed"])
def test_workers_end_with_the_program(tmp_path, end):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents(LENGTHS))
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(script), path, end],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == (0 if end == "returns" else -9)
    workers = [int(pid) for pid in done.stdout.split()]
    (worker,) = workers
    for _ in range(100):
        if not _runs(worker):
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlives the program")


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
