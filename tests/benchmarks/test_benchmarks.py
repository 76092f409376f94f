"""The benchmarks run, at a size that says nothing about speed or memory."""

import json
import pathlib
import subprocess
import sys

import commands
import pytest

FOLDER = commands.ROOT / "tests" / "benchmarks"


def test_pretrained_memory(tmp_path):
    flags = ["--parameters=1e6", "--shard_mb=1", "--devices=2"]
    done = subprocess.run(
        [sys.executable, FOLDER / "pretrained_memory.py", *flags],
        env=commands.environment() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    if not pathlib.Path("/proc/self/clear_refs").exists():  # not Linux
        assert done.returncode == 2 and "no /proc/self/clear_refs" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    result = json.loads(line)
    names = ["load bfloat16", "export float32", "export bfloat16"]
    assert [phase["phase"] for phase in result["phases"]] == names
    assert all(name in "\n".join(table) for name in names)
    assert 1e6 <= result["parameters"] < 3e6 and result["devices"] == 2
    # Norms, one number in a hundred here, are on both devices.
    assert 4 * result["parameters"] <= result["model"] < 4.1 * result["parameters"]
    for phase, width in zip(result["phases"], (2, 4, 2)):
        assert phase["tensors"] == 2 * width * 64 * 128**2  # the embedding and the head
        assert width * 64 * 128**2 <= phase["shard"] <= phase["tensors"]
        assert phase["seconds"] > 0 and phase["beyond"] < 200e6
        assert phase["ratio"] == pytest.approx(
            phase["beyond"] / max(1.5 * phase["shard"], phase["tensors"]), abs=1e-3
        )
    assert not list(tmp_path.iterdir())
