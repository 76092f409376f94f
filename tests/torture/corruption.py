"""Damages a checkpoint in all ways that a disk may, each by itself, and looks what becomes of it.

    python tests/torture/corruption.py

A workdir has two checkpoints. Of the newer one each file is deleted, emptied, cut off, lengthened,
overwritten with zeros or noise, and has single bits turned, all over it; folders are emptied and
removed. What is restored then has to be the newer state or, said aloud, the older one, to the last
bit; and what loads the model to use it has to get these weights, or an error.

Seen on two CPU cores: 647 cases, 299 of them detected and 348 harmless. How many files
there are, and so cases, differs from run to run.
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]

import commands  # noqa: E402
from commands import environment, tiny, train  # noqa: E402

from lm_jax.config import CheckpointConfig  # noqa: E402
from lm_jax.config_json import from_json  # noqa: E402
from lm_jax.errors import UserError  # noqa: E402
from lm_jax.sharding.mesh import make_mesh  # noqa: E402
from lm_jax.training.checkpoint import Checkpoints, abstract_parameters  # noqa: E402
from lm_jax.training.masking import make_masking  # noqa: E402
from lm_jax.training.step import make_step  # noqa: E402

OLDER, NEWER = 10, 20
_KEEP = CheckpointConfig(keep=9)
Damage = Callable[[pathlib.Path], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=6, help="bits to turn in each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workdir = trained(pathlib.Path(folder))
        found = torture(workdir, damages(workdir, options.bits, options.seed))
    counts = collections.Counter((kind, outcome) for kind, _, outcome in found)
    for (kind, outcome), n in sorted(counts.items()):
        print(f"{kind:12} {n:4} {outcome}")
    wrong = [x for x in found if x[2] not in ("harmless", "detected")]
    for kind, where, outcome in wrong:
        print(f"{kind} of {where}: {outcome}")
    outcomes = collections.Counter(outcome for *_, outcome in found)
    seconds = round(time.monotonic() - began)
    print(json.dumps({"cases": len(found), "outcomes": outcomes, "seconds": seconds}))
    sys.exit(bool(wrong))


def trained(folder: pathlib.Path) -> pathlib.Path:
    """A workdir with the checkpoints OLDER and NEWER."""
    corpus = commands.write_corpus(folder / "corpus")
    flags = tiny(corpus, training__steps=NEWER)
    train(*flags, f"--workdir={folder / 'run'}", env=environment(8))
    return folder / "run"


def damages(workdir: pathlib.Path, bits: int, seed: int) -> Iterator[tuple[str, str, Damage]]:
    """(kind, what is damaged, how) of all that is done to the newer checkpoint."""
    drawn, root = random.Random(seed), workdir / "checkpoints" / str(NEWER)
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            yield "removed", f"{name}/", lambda p: shutil.rmtree(p)
            yield "emptied", f"{name}/", _empty_folder
            continue
        size = path.stat().st_size
        yield "deleted", name, lambda p: p.unlink()
        yield "emptied", name, lambda p: p.write_bytes(b"")
        yield "lengthened", name, lambda p: p.write_bytes(p.read_bytes() + b"\0rubbish")
        yield "other file", name, lambda p: p.write_bytes(bytes(range(256)) * 4)
        for share in (0.1, 0.5, 0.9) if size > 1 else ():
            cut = int(size * share)
            yield (
                "cut off",
                f"{name} at {cut}",
                lambda p, cut=cut: p.write_bytes(p.read_bytes()[:cut]),
            )
        if not size:
            continue
        for _ in range(2):
            first = drawn.randrange(size)
            last = min(size, first + max(1, size // 8))
            for kind, byte in (("zeros", None), ("noise", drawn.randrange(256))):
                yield kind, f"{name}, {first} to {last}", _overwriting(first, last, byte)
        for place in sorted({0, size - 1, *(drawn.randrange(size) for _ in range(bits))}):
            bit = drawn.randrange(8)
            yield "a bit turned", f"{name}, byte {place}", _turning(place, bit)
    yield "removed", "/", lambda p: shutil.rmtree(p)
    yield "emptied", "/", _empty_folder


def _empty_folder(path: pathlib.Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _overwriting(first: int, last: int, byte: int | None) -> Damage:
    def damage(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        for i in range(first, last):
            data[i] = 0 if byte is None else (data[i] * 31 + byte) % 256
        path.write_bytes(data)

    return damage


def _turning(place: int, bit: int) -> Damage:
    def damage(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1 << bit
        path.write_bytes(data)

    return damage


def torture(
    workdir: pathlib.Path, cases: Iterator[tuple[str, str, Damage]]
) -> list[tuple[str, str, str]]:
    """Each case with its outcome: harmless, detected, or what went wrong."""
    config = from_json((workdir / "config.json").read_text())
    config.model.vocab_size = 258
    mesh, found = make_mesh(config.mesh), []
    with jax.set_mesh(mesh):
        step = make_step(config, make_masking(config.data, None, 258))
        abstract = jax.eval_shape(step.init)
        skeleton = abstract_parameters(step.skeleton, mesh)
        with Checkpoints(str(workdir)) as checkpoints:
            known = {n: checkpoints.restore(n, abstract, mesh) for n in (OLDER, NEWER)}
        for kind, where, damage in cases:
            copy = workdir.parent / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(workdir, copy)
            damage(
                copy / "checkpoints" / str(NEWER) / where.split(",")[0].split(" at ")[0].strip("/")
            )
            try:
                outcome = _used(copy, skeleton, mesh, known) or _resumed(
                    copy, abstract, mesh, known
                )
            except Exception as e:
                outcome = f"{type(e).__name__}: {e}"
            found.append((kind, where, outcome))
    return found


def _used(workdir, skeleton, mesh, known) -> str:
    """What is wrong with the weights that one gets to use, or ''."""
    with Checkpoints(str(workdir)) as checkpoints:
        try:
            got = checkpoints.restore_parameters(NEWER, skeleton, mesh)
        except UserError:
            return ""
    same = _same(got, known[NEWER][0].parameters)
    return "" if same else "other weights are used, without a word"


def _resumed(workdir, abstract, mesh, known) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), Checkpoints(str(workdir), _KEEP) as checkpoints:
        step, *got = checkpoints.restore_newest(abstract, mesh)
        left = checkpoints.steps()
    state, place = known[step]
    if not (_same(got[0], state) and got[1] == place):
        return f"step {step} is restored, and is not what was saved"
    if left != [n for n in (OLDER, NEWER) if n <= step]:
        return f"afterwards there are {left}"
    if step == OLDER:
        gone = not (workdir / "checkpoints" / str(NEWER)).exists()
        told = "goes on from step 10" in said.getvalue()
        vanished = not (workdir / "damaged" / str(NEWER)).exists()
        return "detected" if gone and (told or vanished) else "the older is restored, unsaid"
    return "harmless"


def _same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)


if __name__ == "__main__":
    main()
