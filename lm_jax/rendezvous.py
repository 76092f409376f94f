"""The processes of a job meet, and each learns at once when another one is gone.

jax's own service ends every process with a stack dump when one is missing or dies, and none of it
can be caught. So process 0 listens at the job's address first: the others report there, are told
where jax's service is, and keep their connection while they live. The kernel closes it when a
process dies, however it died, and keeps probing it in case its host does; threads of Python need
not run for that.
"""

import contextlib
import json
import os
import re
import selectors
import socket
import sys
import threading
import time

from lm_jax.cluster import Job
from lm_jax.errors import AGAIN, WRONG, Interrupted, UserError

_MAGIC = "lm_jax 1"
_LONGEST = 65_536  # bytes of a message
_GRACE = 5.0  # seconds for the others to end first
Message = dict[str, object]


class _Peer:
    """A connection that carries lines of JSON."""

    def __init__(self, sock: socket.socket):
        self.socket, self._buffer = sock, b""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that went down is noticed after 10 + 4 x 5 seconds.
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: object) -> None:
        with contextlib.suppress(OSError):  # whoever is gone is noticed where it is read
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """The messages that have arrived; None at the end of the connection, or of good sense."""
        try:
            data = self.socket.recv(_LONGEST)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.close()


def meet(job: Job, seconds: float) -> tuple[str, "Bond"]:
    """Waits until all processes of the job are there.

    Returns:
      HOST:PORT for jax's service, a free port of process 0's host; and what holds them together.

    Raises:
      Interrupted: one did not come in time.
      UserError: they do not agree on what the job is.
    """
    return _host(job, seconds) if job.index == 0 else _report(job, seconds)


def _host(job: Job, seconds: float) -> tuple[str, "Bond"]:
    host, port = split_address(job.address)
    try:
        listener = _listen(port)
    except OSError as e:
        raise UserError(
            f"several hosts: process 0 cannot listen at port {port} ({e.strerror}): another job has"
            " it, or two processes say that they are process 0; choose another port"
        ) from None
    peers: dict[int, _Peer] = {}
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        deadline = time.monotonic() + seconds
        while len(peers) < job.count - 1:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                _end_all(peers, Interrupted(_missing(job, peers, seconds)))
            for key, _ in ready:
                if key.fileobj is listener:
                    peer = _Peer(listener.accept()[0])
                    selector.register(peer.socket, selectors.EVENT_READ, peer)
                    continue
                peer, messages = key.data, key.data.receive()
                if messages is None:  # a stranger, or one that will come again
                    selector.unregister(peer.socket)
                    peers = {i: p for i, p in peers.items() if p is not peer}
                    peer.close()
                for hello in messages or ():
                    wrong = _contradiction(job, hello, peers)
                    if wrong:
                        _end_all(peers | {-1: peer}, UserError(wrong))
                    peers[int(hello["index"])] = peer
    address = f"{host}:{_free_port()}"
    for peer in peers.values():
        peer.send(go=address)
    return address, Bond(job, peers)


def _contradiction(job: Job, hello: Message, peers: dict[int, _Peer]) -> str:
    if hello.get("hello") != _MAGIC:
        return "several hosts: a process of another version of lm_jax wants to join"
    index, count = hello.get("index"), hello.get("count")
    if count != job.count:
        return (
            f"several hosts: process {index} says that there are {count} processes, and process 0"
            f" that there are {job.count}"
        )
    if index == 0 or index in peers:
        return f"several hosts: two processes say that they are process {index}"
    return ""


def _missing(job: Job, peers: dict[int, _Peer], seconds: float) -> str:
    missing = [str(i) for i in range(1, job.count) if i not in peers]
    names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    return (
        f"several hosts: waited {seconds:.0f} s at {job.address} for the {job.count} processes of"
        f" this job ({job.origin}): {len(peers) + 1} came, and not process {names}: look at their"
        " output, and whether they can reach this address"
    )


def _end_all(peers: dict[int, _Peer], error: UserError) -> None:
    for peer in peers.values():
        peer.send(over=str(error), status=error.status)
        peer.close()
    raise error


def _report(job: Job, seconds: float) -> tuple[str, "Bond"]:
    place, deadline = split_address(job.address), time.monotonic() + seconds
    why = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = _Peer(socket.create_connection(place, timeout=min(left, 10.0)))
        except OSError as e:
            why = e.strerror or str(e)
            time.sleep(min(0.3, left))
            continue
        peer.send(hello=_MAGIC, index=job.index, count=job.count)
        # Process 0 may have begun to wait later, and says itself when it gives up.
        peer.socket.settimeout(seconds + _GRACE)
        messages = peer.receive()
        if messages and "go" in messages[0]:
            peer.socket.settimeout(None)
            return str(messages[0]["go"]), Bond(job, {0: peer})
        peer.close()
        if messages and "over" in messages[0]:
            kind = Interrupted if messages[0].get("status") == AGAIN else UserError
            raise kind(str(messages[0]["over"]))
        why = "what answers there is no process 0 of lm_jax, or it gave up"
        time.sleep(min(0.3, max(0.0, deadline - time.monotonic())))
    raise Interrupted(
        f"several hosts: process {job.index} of {job.count} ({job.origin}) waited {seconds:.0f} s"
        f" for process 0 at {job.address}: {why}; start process 0 on that host, and see that it can"
        " be reached from here"
    )


class Bond:
    """Holds the processes of a job together: where one fails or is gone, all end, and say why."""

    def __init__(self, job: Job, peers: dict[int, _Peer]):
        """Process 0 has all others as peers, each of the others has process 0."""
        self.job, self._peers = job, peers
        self.saved: int | None = None  # a step that the job can go on from, if it is known
        self._over = threading.Lock()  # taken by whoever ends the process
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="lm_jax-peers")
        self._watcher.start()

    def leave(self) -> None:
        """This process is done: its end is nobody's loss."""
        for peer in self._peers.values():
            peer.send(bye=True)

    def claim(self) -> None:
        """Before this process says why it ends: of all that went wrong, one thing is said. Where
        another process's end came first, the watcher is ending this one, and this does not return.
        """
        if not self._over.acquire(blocking=False):
            time.sleep(3 * _GRACE)

    def fail(self, message: str, status: int, how: str = "failed") -> None:
        """Tells the others, which end with this message and exit status; the caller, who has made
        his claim, ends this process."""
        first = message.strip().splitlines()[0] if message.strip() else "unknown"
        me = f"process {self.job.index} of {self.job.count}"
        for peer in self._peers.values():
            peer.send(over=f"{me} {how}: {first}", status=status)
        self._let_others_go()

    def wait_for_the_end(self) -> None:
        """What was raised here may come of another process's end: time to learn of that."""
        self._watcher.join(_GRACE)

    def _let_others_go(self) -> None:
        """jax's service dies with process 0, and would end the others with a stack dump."""
        if self.job.index:
            return
        deadline = time.monotonic() + _GRACE
        for peer in self._peers.values():
            peer.socket.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                while peer.socket.recv(_LONGEST):
                    pass

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, peer in self._peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    messages = self._peers[key.data].receive()
                    if messages is None:
                        self._end(self._gone(key.data), AGAIN)
                    for message in messages or ():
                        if "over" in message:
                            self._end(str(message["over"]), int(message.get("status", WRONG)))
                        if "bye" in message:
                            selector.unregister(key.fileobj)

    def _gone(self, index: int) -> str:
        return (
            f"process {index} of {self.job.count} is gone (killed, out of memory, or its host is"
            " down)"
        )

    def _end(self, message: str, status: int) -> None:
        """Ends this process: jax would wait for the others, or raise where nobody catches it."""
        if not self._over.acquire(blocking=False):  # this process is ending by itself
            time.sleep(3 * _GRACE)
        advice = "restart all processes" if status != WRONG else "mend that, and restart all"
        if self.saved is not None:
            advice += (
                f": the same command goes on from step {self.saved}, or a later one if it is saved"
            )
        start = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""
        os.write(2, f"{start}error: {message}; {advice}\n".encode())
        if self.job.index == 0:
            for peer in self._peers.values():
                peer.send(over=message, status=status)
            self._let_others_go()
        os._exit(status)


current: Bond | None = None  # of this process, once it has joined a job
# How errors of jax begin, or whose they are, where processes do not reach one another any more.
_NETWORK = re.compile(
    r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b|.*(Gloo|NCCL|coordination service)", re.I
)


def is_of_the_network(error: Exception) -> bool:
    """Whether jax says that a process of the job could not be reached: no defect, then."""
    return isinstance(error, RuntimeError) and _NETWORK.match(str(error)) is not None


def split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a kernel with IPv6 switched off
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    return socket.create_server(("", port), backlog=1024)


def _free_port() -> int:
    with socket.create_server(("", 0)) as s:
        return s.getsockname()[1]
