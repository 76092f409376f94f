"""A workdir describes itself: config, tokenizer, checkpoints, metrics, samples.

config.json        the config of the run
base.json          whose the adapters are, of a run that trains adapters alone
tokenizer/         as saved by the tokenizer
checkpoints/STEP/  parameters, optimizer state, place in the data
metrics.jsonl      a line for each logged step and each evaluation
time.jsonl         where the wall time went, over all restarts
report.html        a page about the run, as lm_jax.report makes it
predictions/       of a run with a task, its answers at STEP, and their scores
best/              a run of the checkpoint that the task's first metric found best, on request
samples.txt        what the model wrote, and when
tensorboard/       the same metrics as events
profile/           traces, on request
lock               held while the run is being trained
starts.jsonl       the starts that a launch script made
hang-PROCESS.txt   where a process stood that hung
"""

import contextlib
import copy
import functools
import os
import re
import shutil
from collections.abc import Iterator

from lm_jax import paths
from lm_jax.config import Config
from lm_jax.config_json import from_json, to_json
from lm_jax.config_keys import differences
from lm_jax.data.sources import texts
from lm_jax.data.tokenizer import Tokenizer, load_tokenizer, text_to_learn_from, train_tokenizer
from lm_jax.errors import UserError

TOKEN = "seen_by_all"  # a file that is there while several processes look whether all see it
# What a run that failed before its first step may leave: such a folder is free.
_OWN = {"checkpoints", "tokenizer", "tokenizer.tmp", "config.json.tmp", "lock", "lost+found"}
_OWN |= {"base.json", "base.json.tmp", "time.jsonl", "time.jsonl.tmp", TOKEN, TOKEN + ".tmp"}
_OWN |= {"starts.jsonl", "starts.jsonl.tmp"}
_HANG = re.compile(r"hang-\d+\.txt(\.tmp)?")


def read_config(workdir: str) -> Config:
    """The config of the run in `workdir`.

    Raises:
      UserError: there is no run there.
    """
    path = os.path.join(workdir, "config.json")
    if not paths.isfile(path):
        raise UserError(f"there is no run in '{workdir}': it has no config.json")
    try:
        text = paths.read_bytes(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    return from_json(text, path)


def check(workdir: str, config: Config) -> None:
    """Checks that `workdir` is free or holds this run, without writing to it.

    Raises:
      UserError: it holds a run with another config, or cannot be a folder.
    """
    if paths.remote(workdir) and not workdir.startswith("gs://"):
        raise UserError(
            f"--workdir: '{workdir}': a workdir lies on a disk or in a bucket of Google's (gs://)"
        )
    if paths.exists(os.path.join(workdir, "config.json")):
        changed = differences(read_config(workdir), config)
        if changed:
            raise UserError(
                f"'{workdir}' holds a run of another config; choose another --workdir, or undo:\n  "
                + "\n  ".join(changed)
            )
    elif paths.isfile(workdir):
        raise UserError(f"--workdir: '{workdir}' is a file")
    elif paths.isdir(workdir):
        strange = sorted(n for n in paths.listdir(workdir) if n not in _OWN and not _HANG.match(n))
        if strange:
            raise UserError(
                f"--workdir: '{workdir}' holds other files ('{strange[0]}'), and no run: name a"
                " new folder"
            )
    try:
        paths.makedirs(workdir)
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be made: {e.strerror}") from None


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Keeps other processes of this machine from training in `workdir` at the same time. A bucket
    has no locks.

    Raises:
      UserError: another process holds it.
    """
    if paths.remote(workdir):
        yield
        return
    held = (
        f"'{workdir}' is being trained by process {{process}}: wait for it, stop it, or name"
        " another --workdir"
    )
    with paths.locked(os.path.join(workdir, "lock"), held):
        yield


def settle(workdir: str, config: Config, tokenizer: Tokenizer) -> None:
    """Writes what makes `workdir` this run's; called once all that could be wrong was checked.

    Raises:
      UserError: it cannot be written.
    """
    folder = os.path.join(workdir, "tokenizer")
    try:
        if paths.remote(workdir):  # whose config.json, which comes last, says that it is whole
            if not paths.exists(os.path.join(workdir, "config.json")):
                with paths.folder_for_writing(folder) as local:
                    tokenizer.save(local)
        elif not os.path.isdir(folder):
            shutil.rmtree(folder + ".tmp", ignore_errors=True)
            tokenizer.save(folder + ".tmp")
            os.replace(folder + ".tmp", folder)
        paths.write_whole(os.path.join(workdir, "config.json"), to_json(config))
    except OSError as e:
        raise UserError(f"--workdir: '{workdir}' cannot be written: {e.strerror}") from None


def obtain_tokenizer(workdir: str, config: Config) -> Tokenizer:
    """The run's tokenizer: the workdir's, that of `init_from`, the one named, or a new one."""
    folder = os.path.join(workdir, "tokenizer")
    whole = os.path.join(workdir, "config.json") if paths.remote(workdir) else folder
    if paths.exists(whole):
        return load_tokenizer(folder)
    if config.init_from:
        folder = os.path.join(config.init_from, "tokenizer")  # a run's
        return load_tokenizer(folder if paths.isdir(folder) else config.init_from)
    text = text_to_learn_from(config.tokenizer, functools.partial(texts, config.data))
    return train_tokenizer(config.tokenizer, text, mask=config.data.objective == "masked")


def rounded_vocabulary(size: int) -> int:
    """The model's vocabulary for a tokenizer of `size` ids: matrix units and meshes like round
    numbers; a small vocabulary is left as it is."""
    return size if size <= 1024 else -(-size // 128) * 128


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with `model.vocab_size` filled in, or checked to hold the tokenizer's ids.

    Raises:
      UserError: it does not.
    """
    config, size = copy.deepcopy(config), tokenizer.vocab_size
    least = tokenizer.least_vocabulary  # specials beyond it may be there for other uses
    if config.model.vocab_size is None:
        config.model.vocab_size = rounded_vocabulary(size)
    elif config.model.vocab_size < least:
        advice = "they do not belong together" if config.init_from else "raise it, or leave it None"
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer needs {least} ids:"
            f" {advice}"
        )
    return config
