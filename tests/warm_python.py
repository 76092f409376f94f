"""`python -m lm_jax.COMMAND`, in a process that imported the libraries before it was asked to.

Most of what a tiny command takes is the import of jax, flax and orbax. A server does that once and
forks a process for each command. From there on all is as with `python -m`: the caller's folder,
environment, arguments and standard streams, and the interpreter's own end. Of this package nothing
is imported before.

    python -SI tests/warm_python.py ADDRESS -m lm_jax.COMMAND ARGS

is the caller's side. It passes signals on, ends as the command ends, and takes the command with it
when it is killed. An interpreter of its own runs what the server is not made for: other modules,
and an environment with variables that are read before any code runs.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile

_LIBRARIES = (
    "absl.app",
    "flax.nnx",
    "grain.python",
    "jax",
    "ml_collections.config_flags",
    "optax",
    "orbax.checkpoint",
    "sentencepiece",
    "tokenizers",
)
_READ_AT_START = ("PYTHON", "LC_", "LANG", "MALLOC_", "LD_", "GLIBC_")
_SETTINGS = ("JAX_", "XLA_")  # those of jax are read when it is imported, and told to it again here
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SIZE = 4  # bytes of a number in what is sent

_to_servers: list[socket.socket] = []


def started() -> list[str]:
    """Starts a server that lives as long as this process; the words to put before `-m`."""
    if not hasattr(os, "pidfd_open"):  # not Linux
        return [sys.executable]
    address = os.path.join(tempfile.mkdtemp(), "warm")
    ours, its = socket.socketpair()  # the kernel closes ours, however this process ends
    subprocess.Popen(
        [sys.executable, __file__, "serve", address, str(its.fileno())],
        env={k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)}
        | {"OPENBLAS_NUM_THREADS": "1"},  # of numpy: it would start the others at once
        pass_fds=[its.fileno()],
        start_new_session=True,  # what is sent to the tests' process group is not meant for it
    )
    its.close()
    _to_servers.append(ours)
    if not ours.recv(1):  # it has said why
        return [sys.executable]
    return [sys.executable, "-SI", os.path.abspath(__file__), address]


def serve(address: str, parent: int) -> tuple[str, list[str]]:
    """Forks a process for each request, until the socket `parent` is closed.

    Returns:
      In each forked process: the module that it is to run, and its arguments.
    """
    before = dict(os.environ)
    for name in _LIBRARIES:
        importlib.import_module(name)
    added = {k: v for k, v in os.environ.items() if k not in before}
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("tests/warm_python.py: a library started a thread, which a fork would not have")
    gc.freeze()  # what is never collected stays shared between the processes
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    tests = socket.socket(fileno=parent)
    tests.send(b"1")
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    events.register(tests, selectors.EVENT_READ)
    running: dict[int, tuple[socket.socket, int]] = {}  # process: who asked for it, its pidfd
    while True:
        for key, _ in events.select():
            if key.fileobj is tests:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os.remove(address)
                os.rmdir(os.path.dirname(address))
                os._exit(0)
            elif key.fileobj is listener:
                caller, _ = listener.accept()
                request, streams = _read_request(caller)
                arguments, env = request["arguments"], request["env"]
                if not _ours(arguments) or _read_at_start(env) != _read_at_start(before):
                    pid = 0
                elif not (pid := os.fork()):
                    for open_file in (*events.get_map().values(), caller):
                        os.close(open_file.fileno() if open_file is caller else open_file.fd)
                    events.close()
                    _become(request["folder"], added | env, streams)
                    return arguments[1], arguments[2:]
                for stream in streams:
                    os.close(stream)
                _send(caller, pid)
                if pid:
                    running[pid] = caller, os.pidfd_open(pid)
                    for file in running[pid]:
                        events.register(file, selectors.EVENT_READ, pid)
            elif key.data in running:
                caller, end = running.pop(key.data)
                if key.fileobj is caller:  # it was killed
                    os.kill(key.data, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                if key.fileobj is not caller:
                    _send(caller, code)
                for file in (caller, end):
                    events.unregister(file)
                caller.close()
                os.close(end)


def ask(address: str, arguments: list[str]) -> None:
    """Has the server run a command, and ends as it ends; never returns."""
    process, early = 0, []

    def pass_on(number: int, _: object) -> None:
        os.kill(process, number) if process else early.append(number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"arguments": arguments, "folder": os.getcwd(), "env": dict(os.environ)}
    data = json.dumps(request).encode()
    socket.send_fds(server, [len(data).to_bytes(_SIZE, "big")], [0, 1, 2])
    server.sendall(data)
    process = _receive(server)
    if not process:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in early:
        os.kill(process, number)
    code = _receive(server)
    if code < 0:
        if code not in (-signal.SIGKILL, -signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _ours(arguments: list[str]) -> bool:
    return arguments[:1] == ["-m"] and arguments[1].startswith("lm_jax.")


def _read_at_start(env: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in env.items() if k.startswith(_READ_AT_START)}


def _become(folder: str, env: dict[str, str], streams: list[int]) -> None:
    """What a new process has of its own."""
    import jax

    for to, stream in enumerate(streams):
        os.dup2(stream, to)
        os.close(stream)
    for to, name in enumerate(("stdin", "stdout", "stderr")):  # the old ones know what they were
        old = getattr(sys, name)
        how = {"encoding": old.encoding, "errors": old.errors, "closefd": False}
        by_line = name == "stderr" or os.isatty(to)
        new = open(to, old.mode, 1 if by_line else -1, **how)  # noqa: SIM115 (open to the end)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.chdir(folder)
    sys.path[0] = folder  # it was this file's
    os.environ.clear()
    os.environ.update(env)
    for name, value in jax.config.values.items():
        if (given := env.get(name.upper())) is not None:
            kind = type(value)
            is_true = given.lower() in ("1", "on", "true", "yes")
            jax.config.update(
                name, is_true if kind is bool else given if value is None else kind(given)
            )


def _read_request(caller: socket.socket) -> tuple[dict, list[int]]:
    size, streams, _, _ = socket.recv_fds(caller, _SIZE, 3)
    left, data = int.from_bytes(size, "big"), b""
    while len(data) < left:
        data += caller.recv(left - len(data)) or b"\0" * left  # it was killed: no JSON
    return json.loads(data), streams


def _send(caller: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # killed
        caller.sendall(number.to_bytes(_SIZE, "big", signed=True))


def _receive(server: socket.socket) -> int:
    if len(data := server.recv(_SIZE)) < _SIZE:
        raise SystemExit("the server of tests/warm_python.py is gone")
    return int.from_bytes(data, "big", signed=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        module, rest = serve(sys.argv[2], int(sys.argv[3]))
        sys.argv[:] = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        ask(sys.argv[1], sys.argv[2:])
