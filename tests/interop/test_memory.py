"""A model on its way in or out is on the host for the length of a tensor or two."""

import gc
import tracemalloc
from collections.abc import Callable

import jax
import numpy as np
import pytest
import random_llama
from tiny_models import on_devices

from lm_jax.interop import pretrained
from lm_jax.interop.export import save_pretrained
from lm_jax.interop.safetensors import open_weights

LARGEST = 2**19  # numbers of a feed-forward matrix, of the embedding and of the head
# 26 tensors of that size, and 32 of an eighth: 60 MiB in float32.
MODEL = random_llama.llama(width=256, layers=8, mlp_width=2048, vocab_size=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    random_llama.write(path, MODEL, "bfloat16", 10_000_000)
    assert sum(p.stat().st_size for p in path.iterdir()) > 28 * 2 * LARGEST
    return path


def peak(action: Callable[[], object]) -> int:
    """Bytes of the host, numpy's among them, that `action` holds at its worst, done a second time:
    what the first leaves behind counts, and what compiling takes does not."""
    tracemalloc.start()
    try:
        action()
        gc.collect()
        tracemalloc.reset_peak()
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_the_host_holds_a_few_tensors_however_many_layers_there_are(folder, axes, tmp_path):
    """One that is read, or put together from the devices' parts; one more where it is turned or
    shared out; the third is room for all that is not numbers."""
    mesh, parameters, folders = on_devices(axes), {}, (tmp_path / str(i) for i in range(9))

    def load() -> None:
        parameters.update(pretrained.load_parameters(str(folder), MODEL, mesh))

    def export(dtype: str) -> None:
        with jax.set_mesh(mesh):
            save_pretrained(str(next(folders)), MODEL, parameters, dtype=dtype)

    actions = {4: lambda: export("float32"), 2: lambda: export("bfloat16")}
    assert 1 < peak(load) / (2 * LARGEST) < 3  # bfloat16 as in the file
    for width, action in actions.items():
        assert 1 < peak(action) / (width * LARGEST) < 3, width
    before, after = open_weights(folder), open_weights(tmp_path / "0")
    for name in before.names():
        np.testing.assert_array_equal(after.read(name), before.read(name), err_msg=name)
