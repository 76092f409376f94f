"""Two processes train together, lose one another, and go on; who is missing is named."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
import time

import commands
import numpy as np
import pytest
from commands import environment, losses, stored_arrays, tiny, train

from lm_jax import rendezvous
from lm_jax.cluster import Job
from lm_jax.errors import AGAIN, Interrupted, UserError, ended_by
from lm_jax.evaluators.application import evaluate_task
from lm_jax.evaluators.models import ModelOptions
from lm_jax.training.checkpoint import Checkpoints


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


class Processes:
    """A run of several processes, on as many devices each; whatever is left of it is killed."""

    def __init__(
        self,
        flags: list[str],
        count: int = 2,
        devices: int = 2,
        command: str = "train",
    ):
        place = [f"--coordinator={free_address()}", f"--processes={count}"]
        self.all = [
            commands.start(command, *flags, *place, f"--process={i}", env=environment(devices))
            for i in range(count)
        ]

    def __enter__(self) -> list[subprocess.Popen]:
        return self.all

    def __exit__(self, *_) -> None:
        for process in self.all:
            process.kill()
            process.communicate()


def together(
    flags: list[str], count: int = 2, devices: int = 2, command: str = "train"
) -> list[str]:
    """What each of them printed."""
    printed = []
    with Processes(flags, count, devices, command) as processes:
        for process in processes:
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, out + err
            printed.append(out)
    return printed


def wait_for(step: int, workdir: pathlib.Path, processes: list[subprocess.Popen]) -> None:
    """Until a step is logged."""
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() or max(losses(workdir), default=0) < step:
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return commands.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def flags(corpus):
    """Flags of a run of 4 devices; each of two processes has rows of its own."""

    def of(workdir: pathlib.Path, **overrides) -> list[str]:
        settings = {"training__steps": 12, "checkpoint__every": 4, "mesh__data": 2, "mesh__fsdp": 2}
        settings |= {"tokenizer__kind": "sentencepiece", "tokenizer__vocab_size": 280}
        return [*tiny(corpus, **settings | overrides), f"--workdir={workdir}"]

    return of


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> pathlib.Path:
    """The workdir of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    together(flags(workdir))
    return workdir


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory) -> list[float]:
    """The losses of one process with all the devices."""
    workdir = tmp_path_factory.mktemp("runs") / "one"
    train(*flags(workdir), env=environment(4))
    assert sorted(losses(workdir)) == list(range(1, 13))
    return list(losses(workdir).values())


def test_two_processes_learn_as_one_does(whole, one, flags, tmp_path):
    np.testing.assert_allclose(list(losses(whole).values()), one, atol=1e-5)
    # What they saved on their way goes on in one process, and in four.
    for count in (1, 4):
        copy = tmp_path / f"by_{count}"
        shutil.copytree(whole, copy)
        shutil.rmtree(copy / "checkpoints" / "12")
        if count == 1:
            train(*flags(copy), env=environment(4))
        else:
            together(flags(copy), count, devices=1)
        for step, loss in losses(whole).items():
            assert losses(copy)[step] == pytest.approx(loss, abs=1e-5)


def test_what_one_process_cannot_read_no_other_waits_for(flags, tmp_path):
    workdir, mesh = tmp_path / "run", {"mesh__data": 1, "mesh__fsdp": 4}  # each saves a part
    together(flags(workdir, **mesh))
    expected, parts = losses(workdir), list(workdir.glob("checkpoints/12/*/ocdbt.process_1/d/*"))
    assert parts
    for path in parts:
        path.unlink()
    printed = []
    with Processes(flags(workdir, **mesh)) as processes:
        for process in processes:
            printed.append(process.communicate(timeout=200)[1])
            assert process.returncode == 0, printed
    assert "goes on from step 8, the newest that is intact" in printed[0]
    assert (workdir / "damaged" / "12").is_dir()
    assert losses(workdir) == expected


def test_a_process_that_stops_or_dies_ends_both_and_both_go_on(whole, flags, tmp_path):
    workdir = tmp_path / "run"
    with Processes(flags(workdir)) as processes:  # before there is anything to save
        while not (workdir / "lock").exists():
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert process.returncode == ended_by(signal.SIGTERM) and "SIGTERM" in err, err
    with Processes(flags(workdir)) as processes:
        wait_for(2, workdir, processes)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert process.returncode == ended_by(signal.SIGTERM), err
    with Checkpoints(str(workdir)) as checkpoints:
        saved = checkpoints.latest()
    assert saved == max(losses(workdir)) < 12

    with Processes(flags(workdir)) as processes:
        wait_for(saved + 1, workdir, processes)
        processes[1].kill()
        _, err = processes[0].communicate(timeout=60)
        assert processes[0].returncode == AGAIN
    assert err.count("error: ") == 1 and "Traceback" not in err, err
    assert "error: process 1 of 2 is gone" in err
    assert f"the same command goes on from step {saved}" in err
    assert max(losses(workdir)) < 12

    together(flags(workdir))
    expected, found = stored_arrays(whole, 12), stored_arrays(workdir, 12)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name, strict=True)
    assert losses(workdir) == losses(whole)


def test_processes_that_hold_the_same_rows_read_the_same_rows(one, flags, tmp_path):
    """The tensor axis joins both: neither has rows of its own."""
    joined = {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 4, "checkpoint__every": 0}
    together(flags(tmp_path / "two", **joined))
    np.testing.assert_allclose(list(losses(tmp_path / "two").values()), one, atol=1e-5)


def test_two_processes_answer_examples_as_one_does(tmp_path):
    """In training, where both keep the best model, and by `evaluate`, which goes on with a part."""
    source, run, output = tmp_path / "a.jsonl", tmp_path / "run", tmp_path / "out.jsonl"
    pairs = [{"en": "ab" * (1 + i % 5), "de": "ba" * (1 + i % 5)} for i in range(40)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {
        "data.sources": source,
        "data.validation_fraction": 0.5,
        "tokenizer.kind": "bytes",
        "model.layers": 1,
        "training.steps": 10,
        "training.evaluate_every": 0,
        "task.every": 5,
        "task.beams": 1,
        "task.max_tokens": 5,
        "task.rows": 8,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "logging.tensorboard": False,
    }
    together([
        "--config=configs/translate.py:tiny",
        f"--workdir={run}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ])  # fmt: skip
    best = json.loads((run / "best" / "score.json").read_text())
    assert best["examples"] == 20

    report, result = evaluate_task(str(run / "best"), "translate", output=str(output))
    assert report["step"] == best["step"]
    assert report["scores"][best["metric"]]["value"] == best["value"]
    told = (run / "predictions" / f"{best['step']}.jsonl").read_bytes()
    whole = output.read_bytes()
    assert told == whole and any(r["prediction"] for r in result.records)

    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    flags = ["--task=translate", f"--workdir={run / 'best'}", f"--output={output}"]
    first, second = together(flags, command="evaluate")
    assert json.loads(first.splitlines()[-1]) == json.loads(json.dumps(report))
    assert "scores" not in second and output.read_bytes() == whole
    split = evaluate_task(str(run / "best"), "translate", ModelOptions(fsdp=2, tensor=2))[0]
    assert split["scores"] == report["scores"]
    with pytest.raises(UserError, match="--fsdp=3 x --tensor=1 does not divide the 8 device"):
        evaluate_task(str(run / "best"), "translate", ModelOptions(fsdp=3))
    # Each has another text at the same place, and none is measured with the other's.
    place = [f"--coordinator={free_address()}", "--processes=2", "--source=~/text.jsonl"]
    processes = []
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "text.jsonl").write_text(json.dumps(pairs[i]) + "\n")
        env = environment(4) | {"HOME": str(tmp_path / f"{i}")}
        flags = [f"--workdir={run / 'best'}", *place, f"--process={i}"]
        processes.append(commands.start("evaluate", *flags, env=env))
    for process in processes:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1 and "Traceback" not in err
        assert "process 1 was started for another text than process 0" in err, err
    for changes, said in (
        ({"beams": 2}, "beams: 1 -> 2"),
        ({"model": ModelOptions(dtype="bfloat16")}, "dtype: 'float32' -> 'bfloat16'"),
        ({"sources": (str(source),)}, "predictions for other examples"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_task(str(run / "best"), "translate", output=str(output), **changes)
        assert output.read_bytes() == whole


def test_processes_that_do_not_belong_together_do_not_train(flags, tmp_path):
    """They have different settings, or workdirs that are not one."""

    def start(*each: list[str]) -> list[subprocess.Popen]:
        place = [f"--coordinator={free_address()}", "--processes=2"]
        return [
            commands.start("train", *more, *place, f"--process={i}", env=environment(2))
            for i, more in enumerate(each)
        ]

    folders = [tmp_path / "disk_of_0", tmp_path / "disk_of_1"]
    apart = start(*map(flags, folders))  # who look for a while, in case that a disk is slow
    same = flags(tmp_path / "run")
    for process in start(same, [*same, "--config.training.seed=1"]):
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert err.count("error: ") == 1 and "process 1" in err and "another config" in err, err
    assert not (tmp_path / "run").exists()
    for process in apart:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert err.count("error: ") == 1 and "Traceback" not in err, err
        assert "--workdir must be one folder that all processes see" in err
    assert not any(list(folder.iterdir()) for folder in folders)


# The meeting itself, without jax.


def meet_all(jobs: list[Job], seconds: float = 1.0) -> list[object]:
    """What each process gets: (address, bond) or the message of its error. It is Interrupted if
    one did not come, and else what a restart does not mend."""
    got: list[object] = [None] * len(jobs)

    def meet(i: int) -> None:
        try:
            got[i] = rendezvous.meet(jobs[i], seconds)
        except UserError as e:
            assert isinstance(e, Interrupted) == ("waited" in str(e))
            got[i] = str(e)

    threads = [threading.Thread(target=meet, args=[i]) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return got


def test_all_are_told_the_same_place():
    address = free_address()
    got = meet_all([Job(address, 3, i, "test") for i in range(3)], seconds=20)
    assert len({place for place, _ in got}) == 1 and got[0][0] != address
    for _, bond in got:
        bond.leave()


def test_whoever_is_missing_is_named_to_all_that_came():
    address = free_address()
    for message in meet_all([Job(address, 4, i, "Slurm") for i in (0, 2)]):
        assert "waited 1 s" in message and address in message and "Slurm" in message
        assert "2 came, and not process 1, 3" in message


def test_a_missing_first_process_is_named():
    address = free_address()
    (message,) = meet_all([Job(address, 2, 1, "flags")])
    assert "process 1 of 2" in message and f"process 0 at {address}" in message
    assert "Connection refused" in message


def test_a_stranger_does_not_count():
    address = free_address()

    def knock() -> None:
        while True:
            try:
                with socket.create_connection(rendezvous.split_address(address), 5) as s:
                    return s.sendall(b"GET / HTTP/1.1\r\n\r\n")
            except OSError:
                time.sleep(0.01)

    knocking = threading.Thread(target=knock)
    knocking.start()
    (message,) = meet_all([Job(address, 2, 0, "test")])
    knocking.join()
    assert "1 came, and not process 1" in message


@pytest.mark.parametrize(
    "others, said",
    [
        ([(3, 1)], "process 1 says that there are 3 processes, and process 0 that there are 2"),
        ([(2, 0)], "process 0"),  # the port is taken
    ],
)
def test_processes_that_contradict_each_other_are_named(others, said):
    address = free_address()
    got = meet_all([Job(address, 2, 0, "a"), *(Job(address, n, i, "b") for n, i in others)])
    assert any(said in message for message in got)


def test_two_processes_of_one_number_are_named():
    address = free_address()
    got = meet_all([Job(address, 3, i, "test") for i in (0, 1, 1)], seconds=20)
    assert any("two processes say that they are process 1" in message for message in got)


@pytest.mark.parametrize(
    "said, is_one",
    [
        ("UNKNOWN: [0] Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:3301", True),
        ("UNAVAILABLE: failed to connect to all addresses", True),
        ("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited", True),
        ("INVALID_ARGUMENT: Mismatch of shapes", False),
        ("RESOURCE_EXHAUSTED: Out of memory", False),
    ],
)
def test_an_error_of_the_network_between_processes_is_no_defect(said, is_one):
    assert rendezvous.is_of_the_network(RuntimeError(said)) == is_one
    assert not rendezvous.is_of_the_network(ValueError(said))
