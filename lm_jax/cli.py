"""What every entry point shares: the config flag, and errors that are messages, not tracebacks."""

import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from lm_jax import rendezvous
from lm_jax.config import Config
from lm_jax.config_keys import nearest_key, walk
from lm_jax.errors import AGAIN, WRONG, UserError, ended_by

# What the user can mend: no room, no rights.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

flags.disclaim_key_flags()  # a flag defined here belongs, in --help, to the entry point that asked


def define_config_flag(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    docs = _comments()
    lines = []
    for key, value, f in walk(Config()):
        said = [docs[key]] if key in docs else []
        if choices := f.metadata.get("choices"):
            said.append(" | ".join(map(str, choices)))
        lines.append(f"  --config.{key}={value!r}" + (f"  # {'; '.join(said)}" if said else ""))
    keys = "\n".join(lines)
    try:
        _check_flagfiles(sys.argv)  # which the definition reads already
    except UserError as e:
        _fail(str(e))
    return config_flags.DEFINE_config_file(
        "config",
        help_string="A recipe, FILE.py or FILE.py:ARG, whose get_config(ARG) returns an"
        " lm_jax.config.Config. Single fields can be overridden; the keys with their defaults:\n"
        + keys,
        lock_config=False,
        flag_values=flag_values,
    )


def define_model_flag() -> flags.FlagHolder:
    """--model, and --workdir as another name for it; see `model_of`."""
    holder = flags.DEFINE_string(
        "model", None, "The folder of a training run, or a Hugging Face folder."
    )
    flags.DEFINE_alias("workdir", "model")
    return holder


def model_of(flag: flags.FlagHolder) -> str:
    """The folder that --model or --workdir names.

    Raises:
      UserError: neither is given.
    """
    names = [arg.lstrip("-").partition("=")[0] for arg in sys.argv[1:] if arg.startswith("-")]
    if {"model", "workdir"} <= set(names):
        raise UserError("--model and --workdir name the same thing: give one of them")
    if not flag.value:
        raise UserError(
            "which model? give --model=DIR, the folder that training wrote (its --workdir) or a"
            " Hugging Face folder"
        )
    return flag.value


def define_job_flags(what: str) -> Callable[[], tuple[str | None, int | None, int | None]]:
    """--coordinator, --processes and --process; what is returned reads them, in this order.

    Args:
      what: the processes do together.
    """
    holders = (
        flags.DEFINE_string(
            "coordinator",
            None,
            "Of several processes: HOST:PORT, the host of process 0 and a free port.",
        ),
        flags.DEFINE_integer("processes", None, f"How many processes {what} together.", 1),
        flags.DEFINE_integer("process", None, "Which of them this is, from 0 on.", 0),
    )
    return lambda: tuple(holder.value for holder in holders)


def define_dtype_flag() -> flags.FlagHolder:
    return flags.DEFINE_enum(
        "dtype",
        None,
        ["bfloat16", "float32"],
        "To compute in; default: the run's. Of a published model: bfloat16, float32 on CPUs.",
    )


def define_quantize_flag() -> flags.FlagHolder:
    return flags.DEFINE_enum(
        "quantize",
        None,
        ["int8"],
        "Weights of eight bits and a scale for each output, in a quarter of the memory of float32."
        " Default: the weights as they are.",
    )


def check_new_file(flag: str, path: str) -> None:
    """Checks, before any work is done and not after, that a file can be made.

    Raises:
      UserError: it is there already, or its folder is not.
    """
    if os.path.exists(path):
        raise UserError(f"--{flag}: '{path}' is there already: name another file or remove it")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(f"--{flag}: there is no folder '{os.path.dirname(path)}'")


@functools.cache
def _comments() -> dict[str, str]:
    """Key -> its comment, read from where the field is declared: said once, shown here as well.

    A comment stands behind its field, or above it on lines of its own.
    """
    docs: dict[str, str] = {}

    def read(kind: type, prefix: str) -> None:
        above: list[str] = []
        for line in inspect.getsource(kind).splitlines():
            code, _, comment = line.partition("# ")
            if not code.strip():
                above = [*above, comment] if comment else []
                continue
            if name := re.match(r"    (\w+): ", code):
                docs[prefix + name[1]] = " ".join([*above, *([comment] if comment else [])]).rstrip(
                    "."
                )
            above = []
        for f in dataclasses.fields(kind):
            if dataclasses.is_dataclass(f.type):
                read(f.type, f"{prefix}{f.name}.")

    read(Config, "")
    return {key: comment for key, comment in docs.items() if comment}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around what a command imports, which stays for good. Without this, the garbage collector goes
    through it again and again: 18% of the CPU time of a run of two steps of a tiny model.

    Nothing that is imported may start jax's backends: see `runtime.configure`, which comes after.
    Ctrl-C ends the process at once: an exception in the middle of a library's own start would come
    out of it as another, or as a crash.
    """
    collected, interrupted = gc.isenabled(), signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    gc.disable()
    try:
        yield
    finally:
        if interrupted is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted)
        gc.freeze()
        if collected:
            gc.enable()


def _interrupted(*_: object) -> NoReturn:  # as a handler of signals too
    sys.stdout.flush()
    print("\ninterrupted", file=sys.stderr, flush=True)
    # Not by way of XLA's own end, which crashes in the middle of a step.
    os._exit(ended_by(signal.SIGINT))


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main` as `absl.app.run` does; a UserError ends the process with its message.

    Of a job of several processes, the end of one with an error ends all of them.
    """

    def guarded(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument '{argv[1]}': flags are --name=value")
            main(argv)
        except UserError as e:
            _fail(str(e), e.status)
        except RuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                _raise_in_job(e)
            _fail(
                "out of device memory: for training, raise training.accumulation, set"
                " model.remat=full, lower data.batch_size or raise mesh.fsdp; else lower"
                f" --batch_size\n{e}"
            )
        except OSError as e:
            if e.errno not in _OF_THE_DISK:
                _raise_in_job(e)
            _fail(f"{e.filename or 'writing'}: {e.strerror}")
        except Exception as e:
            _raise_in_job(e)
        except KeyboardInterrupt:
            _interrupted()

    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True)  # absl's own --help counts as a failure
        sys.exit(0)
    app.run(guarded, flags_parser=_parse)


def config_of(flag: flags.FlagHolder) -> Config:
    """The config that the command line names.

    Raises:
      UserError: there is none, it could not be read, or it is not a Config.
    """
    if flag.value is None:
        raise UserError("which recipe? give --config=FILE.py, as in --config=configs/quickstart.py")
    if not isinstance(flag.value, Config):
        raise UserError(
            "--config: not a readable recipe, or its get_config() did not return an"
            f" lm_jax.config.Config but {type(flag.value).__name__}"
        )
    return flag.value


def overridden(flag: flags.FlagHolder) -> set[str]:
    """The keys of the config that the command line set itself."""
    return set(config_flags.get_override_values(flags.FLAGS[flag.name]))


def _fail(message: str, status: int = WRONG) -> None:
    if rendezvous.current is not None:
        rendezvous.current.claim()
    print(f"error: {message}", file=sys.stderr, flush=True)
    _end_job(message, status)
    sys.exit(status)


def _raise_in_job(error: Exception) -> None:
    """Raises what is a defect; or, of several processes, what came of another one's end is not."""
    if rendezvous.current is not None:
        rendezvous.current.wait_for_the_end()
        rendezvous.current.claim()
        traceback.print_exception(error)
        status = AGAIN if rendezvous.is_of_the_network(error) else WRONG
        _end_job(f"{type(error).__name__}: {error}", status)
    raise error


def _end_job(message: str, status: int) -> None:
    """Ends this process and the others, if there are any; jax's own end would wait for them."""
    if rendezvous.current is not None:
        rendezvous.current.fail(message, status)
        sys.stdout.flush()
        os._exit(status)


def _parse(argv: list[str]) -> list[str]:
    known = {key: value for key, value, _ in walk(Config())}
    for i in range(len(argv) - 2, 0, -1):
        if argv[i] in ("--config", "-config"):  # --config FILE is --config=FILE
            argv[i : i + 2] = [f"--config={argv[i + 1]}"]
    # A tuple that is given again would be added to; it overrides, as every other key does.
    last = {arg.partition("=")[0]: i for i, arg in enumerate(argv)}
    argv = [a for i, a in enumerate(argv) if "config." not in a or last[a.partition("=")[0]] == i]
    try:
        _check_flagfiles(argv)
        return flags.FLAGS([_checked(arg, argv, known) for arg in argv])
    except UserError as e:
        _fail(str(e))
    except flags.UnrecognizedFlagError as e:
        near = [f"'--{name}'" for name in _meant(e.flagname, list(known))]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        _fail(f"no flag '--{e.flagname}'{hint} (--help lists them)")
    except Exception as e:  # whatever a recipe raises, and absl's own complaints
        recipe = next((a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)), "")
        _fail(_explain(e, recipe.split(":")[0]))


def _check_flagfiles(argv: list[str]) -> None:
    """
    Raises:
      UserError: a file that --flagfile names cannot be read.
    """
    try:
        flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    except flags.CantOpenFlagFileError as e:
        why = e.__context__
        raise UserError(f"--flagfile: '{why.filename}': {why.strerror}") from None
    except ValueError:
        named = [arg.partition("=")[2] for arg in argv if re.match("--?flagfile=", arg)]
        raise UserError(f"--flagfile: '{', '.join(named)}' is no text in UTF-8") from None
    except flags.Error as e:
        raise UserError(str(e)) from None


def _meant(name: str, keys: list[str]) -> list[str]:
    """The flags that one that is not there most likely stands for: all keys of the config that end
    so, or else what is spelled alike."""
    keys = keys if "config" in flags.FLAGS else []
    if found := [f"config.{key}" for key in keys if f".{key}".endswith(f".{name}")]:
        return found
    near = difflib.get_close_matches(name, list(flags.FLAGS), n=1)
    key = nearest_key(name) if keys and not near else None
    return [f"config.{key}"] if key else near


def _explain(error: BaseException, recipe: str) -> str:
    """One message for what a recipe raised, with its line, or for what absl complains of."""
    outer = _last_line(error)
    while error.__context__ is not None:  # absl and ml_collections wrap the cause
        error = error.__context__
    said = _last_line(error)
    if isinstance(error, UserError):
        return str(error)
    if match := re.fullmatch(r"invalid literal for int\(\) with base 10: ('.*')", said):
        return outer.replace(said, f"{match[1]} is no whole number")
    if match := re.fullmatch(r"could not convert string to float: ('.*')", said):
        return outer.replace(said, f"{match[1]} is no number")
    if "has no attribute 'get_config'" in said:
        return f"{recipe}: a recipe needs a function get_config() that returns a Config"
    if "get_config() takes" in said:
        return f"{recipe}: this recipe has no variants: leave out what follows the colon"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.lineno for f in frames if recipe and _same(f.filename, recipe)]
    if not inside:
        return outer
    if match := re.search(r"unexpected keyword argument '(\w+)'", said):
        names = [key.rpartition(".")[2] for key, _, _ in walk(Config())]
        near = difflib.get_close_matches(match[1], names, n=1)
        said += f"; did you mean '{near[0]}'?" if near else ""
    return f"{recipe}:{inside[-1]}: {type(error).__name__}: {said}"


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


def _same(a: str, b: str) -> bool:
    return os.path.exists(a) and os.path.exists(b) and os.path.samefile(a, b)


def _checked(arg: str, argv: list[str], known: dict) -> str:
    """Checks a flag that is about the config, and returns it in the form that absl parses."""
    if match := re.fullmatch(r"--?config=([^:]*)(:.*)?", arg):
        path = match[1]
        if not os.path.isfile(path):
            folder = os.path.dirname(path) or "."
            names = os.listdir(folder) if os.path.isdir(folder) else []
            names = sorted(name for name in names if name.endswith(".py"))
            near = difflib.get_close_matches(os.path.basename(path), names, n=1, cutoff=0.7)
            hint = f"; did you mean '{os.path.join(folder, near[0])}'?" if near else ""
            if names and not near:
                hint = f"; there are {', '.join(names)}"
            raise UserError(f"--config: there is no recipe '{path}'{hint}")
    if match := re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", arg, re.DOTALL):
        key, value = match.groups()
        if "config" in flags.FLAGS and not any(re.match(r"--?config(=|$)", a) for a in argv):
            raise UserError(f"{arg}: give the recipe first, with --config=FILE.py")
        if key not in known:
            if any(k.startswith(key + ".") for k in known):
                raise UserError(f"'{key}' is a section of the config: set one of its keys")
            near = nearest_key(key)
            raise UserError(
                f"no config key '{key}'" + (f"; did you mean '{near}'?" if near else "")
            )
        if isinstance(known[key], tuple) and value is not None:
            return f"--config.{key}={_as_tuple(value)!r}"
    return arg


def _as_tuple(text: str) -> tuple:
    """('a', 'b'), a,b and a path alone are all tuples; numbers become numbers."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(part for part in text.split(",") if part)
    return tuple(value) if isinstance(value, tuple | list) else (value,)
