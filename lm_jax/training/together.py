"""What the processes of a job settle among themselves before they train."""

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; orbax takes it from here as well
from jax.experimental import multihost_utils

from lm_jax.config import Config, to_json
from lm_jax.data.tokenizer import Tokenizer, load_tokenizer
from lm_jax.errors import UserError

_LONGEST_WAIT = 24 * 60 * 60 * 1000  # milliseconds; a process that dies ends the wait


def check_same(config: Config) -> None:
    """Processes with other settings would train other models into one, or wait for ever.

    Raises:
      UserError: they have not all been started with this config.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(to_json(config).encode()).digest()[:8], np.uint32)
    of_all = multihost_utils.process_allgather(digest)
    if wrong := [i for i, other in enumerate(of_all) if (other != of_all[0]).any()]:
        raise UserError(
            f"process {wrong[0]} was started with another config than process 0: start all with the"
            " same command, the number of the process aside"
        )


def made_once(make: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that the first process makes: learning it twice might give two."""
    if jax.process_count() == 1:
        return make()
    packed = io.BytesIO()
    if jax.process_index() == 0:
        tokenizer = make()
        with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=packed, mode="w") as tar:
            tokenizer.save(os.path.join(folder, "tokenizer"))
            tar.add(os.path.join(folder, "tokenizer"), "tokenizer")
    # Learning takes minutes, for which the devices' networks do not all wait.
    distributed.global_state.client.wait_at_barrier("lm_jax/tokenizer", _LONGEST_WAIT)
    mine = np.frombuffer(packed.getvalue(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(mine.size)))
    mine = mine if mine.size else np.zeros(size, np.uint8)
    data = np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)
    if jax.process_index() == 0:
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(data.tobytes())) as tar:
            tar.extractall(folder, filter="data")
        return load_tokenizer(os.path.join(folder, "tokenizer"))
