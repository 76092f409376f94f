"""What the processes of a job settle among themselves before they train."""

import contextlib
import hashlib
import io
import json
import os
import secrets
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; orbax takes it from here as well
from jax.experimental import multihost_utils

from lm_jax import paths
from lm_jax.config import Config
from lm_jax.config_json import to_json
from lm_jax.data.tokenizer import Tokenizer, load_tokenizer
from lm_jax.errors import UserError
from lm_jax.training.workdir import TOKEN

_LONGEST_WAIT = 24 * 60 * 60 * 1000  # milliseconds; a process that dies ends the wait
_SHOWN = 10.0  # seconds until a file that one process wrote is seen by all


def check_same_config(config: Config) -> None:
    """As `check_same`."""
    check_same(to_json(config), "with another config")


def check_same(value: Any, what: str) -> None:
    """Processes with other settings would compute other things together, or wait for ever.

    Args:
      value: what must be the same on all of them, fit for JSON.
      what: 'with another ...' of a process where it is not, for the message.

    Raises:
      UserError: it is not.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(value, sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)
    of_all = multihost_utils.process_allgather(digest)
    if wrong := [i for i, other in enumerate(of_all) if (other != of_all[0]).any()]:
        raise UserError(
            f"process {wrong[0]} was started {what} than process 0: start all with the"
            " same command, the number of the process aside"
        )


@jax.transfer_guard("allow")
def said_by_first(value: Any) -> Any:
    """What process 0 gives, on all processes: of those, a disk may look otherwise to each.

    Args:
      value: fit for JSON; of the other processes it does not matter.
    """
    if jax.process_count() == 1:
        return value
    own = json.dumps(value).encode() if jax.process_index() == 0 else b""
    return json.loads(_bytes_of_first(own))


@jax.transfer_guard("allow")
def of_all(value: Any) -> list[Any]:
    """What each process gives, on all of them.

    Args:
      value: fit for JSON.
    """
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.array(mine.size)).max())
    parts = multihost_utils.process_allgather(np.pad(mine, (0, size - mine.size)))
    return [json.loads(bytes(part).rstrip(b"\0")) for part in np.asarray(parts)]


def _bytes_of_first(own: bytes) -> bytes:
    mine = np.frombuffer(own, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(mine.size)))
    mine = mine if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes()


def check_one_folder(workdir: str) -> None:
    """Each process saves its part of a checkpoint, and waits for ever for parts that went into
    another folder of the same name. Process 0 writes a word that all of them are to read.

    Raises:
      UserError: on all processes, where `workdir` is not one and the same folder.
    """
    if jax.process_count() == 1:
        return
    remote = paths.remote(workdir)
    digest = hashlib.sha256(paths.absolute(workdir).encode()).digest() if remote else bytes(8)
    of_all = multihost_utils.process_allgather(np.frombuffer(digest[:8], np.uint32))
    wrong = [i for i, other in enumerate(of_all) if (other != of_all[0]).any()]
    if not wrong and not remote:
        path = os.path.join(workdir, TOKEN)
        token = secrets.token_hex(16)
        if jax.process_index() == 0:
            try:
                paths.write_whole(path, token)
            except OSError as e:
                raise UserError(f"--workdir: '{workdir}' cannot be written: {e.strerror}") from None
        sent = multihost_utils.broadcast_one_to_all(np.frombuffer(token.encode(), np.uint8))
        token = np.asarray(sent, np.uint8).tobytes().decode()
        seen = multihost_utils.process_allgather(np.array(_holds(path, token)))
        if jax.process_index() == 0:
            os.unlink(path)
        wrong = np.flatnonzero(~seen).tolist()
    if wrong:
        raise UserError(
            f"--workdir must be one folder that all processes see: '{workdir}' of process"
            f" {jax.process_index()} is not the same one on process {wrong[0]} as on process 0:"
            " name a folder of a network disk, or a bucket (gs://BUCKET/RUN)"
        )


def _holds(path: str, token: str) -> bool:
    """Whether a file says so, within the time that a network disk takes to show it."""
    deadline = time.monotonic() + _SHOWN
    while True:
        with contextlib.suppress(OSError):
            if paths.read_text(path) == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


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
    data = _bytes_of_first(packed.getvalue())
    if jax.process_index() == 0:
        return tokenizer
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(folder, filter="data")
        return load_tokenizer(os.path.join(folder, "tokenizer"))
