"""How fast text becomes tokens, and tokens batches: `lm_jax.tokenize` against the libraries that it
calls, and the training stream against the model that it feeds.

    python tests/benchmarks/feeding.py --text=FILE --folder=/disk/with/room

For Linux. The corpus is the lines of `--text` in a random order, over and over, each a document:
once of `--megabytes`, once of a tenth of that. Two tokenizers learn from it, ours and a byte-level
BPE of the `tokenizers` library. The library encodes the smaller corpus, which it has in memory, by
all cores, ten times; the command reads the larger one, its own start included. They take turns.
Memory is the peak of the command and its workers together, of either corpus. Then the command is
killed outright and goes on. The model is that of `training.py`, in float32; batches come from a
stream in a thread of its own, while nothing else runs. Prints tables of medians and a JSON line.

Seen on two CPU cores, WikiText-2's validation text: the command writes 7.37 MB/s where the library
encodes 7.67 (SentencePiece), and 4.20 where it encodes 3.71 (BPE); 166 and 167 MiB for 20 and 200
MB (SentencePiece), 204 and 205 (BPE). In a step of 1650 ms the stream has 124 batches ready from
text, and 198 from tokens.
"""

import argparse
import filecmp
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import contenders
import resident
import training

ROOT = pathlib.Path(__file__).parent.parent.parent
_TIMES = 10  # that the larger corpus is as large as the smaller one
KINDS = ("sentencepiece", "bpe")


def write_corpus(path: pathlib.Path, lines: list[str], size: float) -> None:
    """Lines in an order that is the same each time, to `size` bytes or a little more."""
    rng, written = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as f:
        while written < size:
            for line in rng.sample(lines, len(lines)):
                f.write(line + "\n")
                written += len(line.encode()) + 1
                if written >= size:
                    break


def make_tokenizer(kind: str, lines: list[str], vocab_size: int, path: pathlib.Path) -> None:
    if kind == "sentencepiece":
        from lm_jax.config import TokenizerConfig
        from lm_jax.data.tokenizer import train_tokenizer

        config = TokenizerConfig(vocab_size=vocab_size)
        train_tokenizer(config, ["\n".join(lines)]).save(path)
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))


def raw(kind: str, folder: pathlib.Path) -> None:
    """A contender: the library alone, on text that is in memory."""
    lines = (folder / "small.txt").read_text(encoding="utf-8").splitlines()
    if kind == "bpe":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(folder / kind / "tokenizer.json"))

        def encode(batch: list[str]) -> None:
            tokenizer.encode_batch(batch, add_special_tokens=False)
    else:
        import sentencepiece

        tokenizer = sentencepiece.SentencePieceProcessor(
            model_file=str(folder / kind / "tokenizer.model")
        )

        def encode(batch: list[str]) -> None:
            tokenizer.encode(batch, num_threads=len(os.sched_getaffinity(0)))

    def take(times: int) -> dict[str, Any]:
        begun = time.perf_counter()
        for _ in range(times):
            for first in range(0, len(lines), 8192):  # of all at once, memory would be the limit
                encode(lines[first : first + 8192])
        return {"seconds": (time.perf_counter() - begun) / times}

    encode(lines[:100])
    contenders.compete({}, take)


class Command:
    """`lm_jax.tokenize`, running."""

    def __init__(self, kind: str, folder: pathlib.Path, corpus: str, output: str):
        command = [sys.executable, "-m", "lm_jax.tokenize", f"--source={folder / corpus}"]
        command += [f"--tokenizer={folder / kind}", f"--output={folder / output}"]
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, "--document=line"], cwd=ROOT, stdout=subprocess.DEVNULL
        )

    def end(self) -> tuple[float, int]:
        """Seconds that it took, and the sum of the peaks of its processes, in bytes."""
        peak, pid = 0, self.process.pid
        while self.process.poll() is None:
            try:
                children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                peak = max(peak, sum([resident.resident("VmHWM", p) for p in (pid, *children)]))
            except (OSError, StopIteration):  # one of them has ended
                pass
            time.sleep(0.05)
        if self.process.returncode:
            raise SystemExit(f"lm_jax.tokenize ended with {self.process.returncode}")
        return time.perf_counter() - self.begun, peak


def tokenizing(kind: str, folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    small, large = ((folder / f"{name}.txt").stat().st_size for name in ("small", "large"))
    library = contenders.begin(f"raw-{kind}", "cpu")
    contenders.told(library)
    seen: dict[str, list[float]] = {"raw": [], "command": []}
    for _ in range(rounds):
        shutil.rmtree(folder / "tokens", ignore_errors=True)
        seen["raw"].append(contenders.turn(library, _TIMES)["seconds"])
        seconds, peak = Command(kind, folder, "large.txt", "tokens").end()
        seen["command"].append(seconds)
    contenders.end(library)
    _, peak_of_small = Command(kind, folder, "small.txt", "small").end()
    killed = Command(kind, folder, "large.txt", "killed")
    time.sleep(seconds / 2)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    after, _ = Command(kind, folder, "large.txt", "killed").end()
    names = ["ids", "ends", "lm_jax_tokens.json"]
    _, different, missing = filecmp.cmpfiles(
        folder / "tokens", folder / "killed", names, shallow=False
    )
    rates = {
        "raw": small / statistics.median(seen["raw"]) / 1e6,
        "command": large / statistics.median(seen["command"]) / 1e6,
    }
    print(
        f"{kind:<14} {rates['raw']:>8.2f} {rates['command']:>8.2f}"
        f" {rates['command'] / rates['raw']:>7.1%} {peak_of_small / 2**20:>8,.0f}"
        f" {peak / 2**20:>8,.0f} {seconds / 2:>8.1f} {after:>8.1f}"
    )
    for name in ("tokens", "killed"):
        shutil.rmtree(folder / name)
    return {name: round(rate, 3) for name, rate in rates.items()} | {
        "share": round(rates["command"] / rates["raw"], 4),
        "memory": [peak_of_small, peak],
        "after_a_kill": round(after, 2),
        "same_after_a_kill": not different and not missing,
    }


def feeding(folder: pathlib.Path, kind: str, flags: argparse.Namespace) -> dict[str, Any]:
    """How many batches the streams have ready in the time of a step."""
    import jax
    import numpy as np
    import train_step

    from lm_jax import runtime
    from lm_jax.config import DataConfig
    from lm_jax.data.loader import train_stream
    from lm_jax.data.tokenizer import load_tokenizer

    runtime.configure()
    shape = training.SHAPES[flags.shape]
    config = training.config_of(shape, training.ON_CPU)
    tokenizer, data = load_tokenizer(folder / kind), config.data
    made_of = {"text": str(folder / "small.txt"), "tokens": f"tokens:{folder / 'small'}"}
    streams = {
        name: train_stream(
            DataConfig(
                sources=(source,),
                document="line",
                length=data.length,
                batch_size=data.batch_size,
                lanes=data.lanes,
            ),
            tokenizer,
            seed=0,
        )
        for name, source in made_of.items()
    }
    rng = np.random.default_rng(0)
    shape = data.batch_size, data.length + 1
    tokens = rng.integers(1, config.model.vocab_size, shape).astype(np.int32)
    mesh, _, update, state, batch = train_step.begin(config, tokens)
    seen: dict[str, list[float]] = {name: [] for name in ("step", *made_of)}
    with jax.set_mesh(mesh):
        for i in range(flags.rounds + 1):
            begun = time.perf_counter()
            for _ in range(flags.steps):
                state, _ = update(state, batch)
            jax.block_until_ready(state)
            seen["step"].append((time.perf_counter() - begun) / flags.steps)
            for name, stream in streams.items():
                for _ in range(8):  # what was read ahead, and the first batch
                    next(stream)
                begun = time.perf_counter()
                for _ in range(flags.batches):
                    next(stream)
                seen[name].append((time.perf_counter() - begun) / flags.batches)
                stream.close()  # it would read ahead beside the others
            if not i:  # compiles
                seen = {name: [] for name in seen}
    medians = {name: statistics.median(each) for name, each in seen.items()}
    return medians | {
        f"times_{name}": round(medians["step"] / medians[name], 2) for name in made_of
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--folder", required=True, help="where to write; made, and removed after")
    parser.add_argument("--megabytes", type=float, default=200, help="of the larger corpus")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--tokenizers", default=",".join(KINDS))
    parser.add_argument("--shape", default="gpt", choices=training.SHAPES)
    parser.add_argument("--steps", type=int, default=3, help="of the model in a turn")
    parser.add_argument("--batches", type=int, default=500, help="of a stream in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    folder = pathlib.Path(flags.folder)
    if flags.contender:
        raw(flags.contender.removeprefix("raw-"), folder)
        return
    resident.check(parser)
    if folder.exists():
        parser.error(f"--folder: '{folder}' is there already: name one to be made")
    folder.mkdir(parents=True)
    text = pathlib.Path(flags.text).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    for name, size in (("small", flags.megabytes / _TIMES), ("large", flags.megabytes)):
        write_corpus(folder / f"{name}.txt", lines, size * 1e6)
    result: dict[str, Any] = {"megabytes": flags.megabytes, "cores": os.cpu_count()}
    print(
        f"{'':<14} {'library':>8} {'command':>8} {'':>7} {'MiB at':>8} {'MiB at':>8}"
        f" {'killed':>8} {'went on'!s:>8}"
    )
    print(
        f"{'':<14} {'MB/s':>8} {'MB/s':>8} {'share':>7} {flags.megabytes / _TIMES:>5g} MB"
        f" {flags.megabytes:>5g} MB {'after s':>8} {'for s':>8}"
    )
    kinds = flags.tokenizers.split(",")
    for kind in kinds:
        make_tokenizer(kind, lines, flags.vocab_size, folder / kind)
        shutil.rmtree(folder / "small", ignore_errors=True)
        result[kind] = tokenizing(kind, folder, flags.rounds)
    result["feeding"] = fed = feeding(folder, kinds[-1], flags)
    print(f"a step of the model: {1000 * fed['step']:,.1f} ms; batches in that time:")
    for name in ("text", "tokens"):
        print(f"{fed[f'times_{name}']:>10,.1f} from {name} ({1000 * fed[name]:.2f} ms each)")
    shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
