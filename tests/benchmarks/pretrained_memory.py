"""How much memory of the host a published model takes on its way in and out.

    python tests/benchmarks/pretrained_memory.py [--parameters=600e6] [--shard_mb=400] [--devices=1]

It writes a Llama of random bfloat16 weights, loads it onto simulated CPU devices that share it out,
and exports it in float32 and in bfloat16. Nothing is downloaded. The folder for temporary files
(TMPDIR) needs room for 6 bytes a parameter. Linux only: see `resident`.

It prints a table, and then the same numbers in one line of JSON. Of each phase, in bytes:

    seconds    by the clock, compilation included
    model      the parameters on the devices. A CPU device's memory is the host's, so a peak has
               them in it
    shard      the largest file that the phase reads or writes
    tensors    the two largest tensors of those files
    beyond     the peak of resident memory beyond what was resident before, and beyond the model
               where the phase is what puts it there
    ratio      beyond / max(1.5 x shard, tensors). Above 1 the host would be better off with a
               whole file in memory

A tiny model goes the same way first: what jax and its compiler take once is not in the figures.
What they take for each shape is, some 10 MB: of models below 50M parameters the ratio says little.
"""

import argparse
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile

import resident

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # random_llama, and lm_jax from this checkout


def at_least(parameters: float):
    """A Llama's shape. Its vocabulary is large, as those of published models of this size are."""
    from random_llama import llama

    def count(width: int) -> int:  # but for the norms
        return 2 * 64 * width**2 + width // 64 * (4 + 3 * 3) * width**2

    width = next(w for w in range(64, 2**20, 64) if count(w) >= parameters)
    return llama(width=width, layers=width // 64, mlp_width=3 * width, vocab_size=64 * width)


def write(folder: pathlib.Path, parameters: float, shard_bytes: int) -> None:
    import random_llama

    random_llama.write(folder, at_least(parameters), "bfloat16", shard_bytes)


def files(folder: pathlib.Path) -> tuple[int, int]:
    """Bytes of the largest file of weights, and of the two largest tensors."""
    from lm_jax.interop.safetensors import open_weights

    weights = open_weights(folder)
    sizes = [weights.dtype(n).itemsize * math.prod(weights.shape(n)) for n in weights.names()]
    largest = max(os.path.getsize(path) for path in folder.glob("*.safetensors"))
    return largest, sum(sorted(sizes)[-2:])


def run(folder: pathlib.Path, parameters: float, shard_bytes: int, devices: int) -> dict:
    """Writes a model into `folder`, loads and exports it."""
    import jax

    from lm_jax.config import MeshConfig
    from lm_jax.interop.export import save_pretrained
    from lm_jax.interop.pretrained import load_parameters
    from lm_jax.sharding.mesh import make_mesh

    source, target, held, phases = folder / "in", folder / "out", {}, []
    # By another process: what it leaves resident would make the first phase look better.
    spawn = multiprocessing.get_context("spawn")
    writer = spawn.Process(target=write, args=(source, parameters, shard_bytes))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the model could not be written")
    model, mesh = at_least(parameters), make_mesh(MeshConfig(1, devices, 1))

    def note(name: str, seconds: float, beyond: int, weights: pathlib.Path) -> None:
        shard, tensors = files(weights)
        phases.append(
            {
                "phase": name,
                "seconds": round(seconds, 2),
                "shard": shard,
                "tensors": tensors,
                "beyond": beyond,
                "ratio": round(beyond / max(1.5 * shard, tensors), 3),
            }
        )

    def load() -> None:
        held.update(jax.block_until_ready(load_parameters(str(source), model, mesh)))

    seconds, beyond = resident.measure(load)
    on_devices = sum(s.data.nbytes for x in held.values() for s in x.addressable_shards)
    note("load bfloat16", seconds, beyond - on_devices, source)
    for dtype in ("float32", "bfloat16"):

        def export(dtype: str = dtype) -> None:
            with jax.set_mesh(mesh):
                save_pretrained(str(target), model, held, dtype=dtype, max_shard_bytes=shard_bytes)

        note(f"export {dtype}", *resident.measure(export), target)
        shutil.rmtree(target)
    return {
        "parameters": sum(x.size for x in held.values()),
        "devices": devices,
        "model": on_devices,
        "phases": phases,
    }


def main() -> None:
    about, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=600e6, help="at least so many")
    parser.add_argument("--shard_mb", type=float, default=400.0, help="the most of a file, in MB")
    parser.add_argument("--devices", type=int, default=1, help="simulated")
    args = parser.parse_args()
    resident.check(parser)
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.devices}"
    with tempfile.TemporaryDirectory() as folder:
        path, shard_bytes = pathlib.Path(folder), round(args.shard_mb * 1e6)
        run(path / "first", 0, shard_bytes, args.devices)
        result = run(path / "second", args.parameters, shard_bytes, args.devices)
    print(
        f"{result['parameters'] / 1e6:.1f}M parameters on {result['devices']} CPU device(s),"
        f" {result['model'] / 1e6:.1f} MB there"
    )
    print(f"{'phase':<16}{'seconds':>8}{'shard MB':>10}{'tensors MB':>12}{'beyond MB':>11}  ratio")
    for p in result["phases"]:
        shard, tensors, beyond = (p[key] / 1e6 for key in ("shard", "tensors", "beyond"))
        print(
            f"{p['phase']:<16}{p['seconds']:>8.1f}{shard:>10.1f}{tensors:>12.1f}{beyond:>11.1f}"
            f"{p['ratio']:>7.2f}"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
