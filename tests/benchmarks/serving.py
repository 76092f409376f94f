"""Many clients at once against one after the other, and each answer against the generator's.

    python tests/benchmarks/serving.py --model=DIR

Starts `python -m lm_jax.serve` on a free port of this machine. First one client asks request after
request, then `--clients` of them do, each as soon as it has its answer, while others send what is
no JSON, what is too large, and streams that they leave. Half of the requests are streamed. Every
answer is compared with what `Generator` makes of its prompt, seed and sampling alone. The server is
then stopped by SIGTERM while it works. Prints a table and a JSON line; exits with 1 if an answer
differs, something wrong is not refused, or the server does not end well.

Seen with SmolLM2-135M-Instruct on two CPU cores, float32, 64 tokens an answer, 16 slots:

| clients | answers | tokens/s | median wait | longest wait |
|---|---|---|---|---|
| 1 | 42 | 20.83 | 2.93 s | 4.11 s |
| 50 | 207 | 80.12 | 37.16 s | 44.84 s |

All answers were those of the generator.
"""

import argparse
import collections
import concurrent.futures
import http.client
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pydoc_data import topics

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.8, "top_p": 0.9},
)
BODY_BYTES = 20_000


def requests(count: int, tokens: int) -> list[dict]:
    """Different prompts of 5 to 40 words, with a sampling and a seed each."""
    words = " ".join(topics.topics.values()).split()
    return [
        {
            "prompt": " ".join(words[200 * i : 200 * i + 5 + 7 * i % 36]),
            "max_tokens": tokens,
            "seed": i,
            **SAMPLINGS[i % len(SAMPLINGS)],
        }
        for i in range(count)
    ]


def ask(port: int, request: dict, stream: bool) -> tuple[str, int]:
    """The text of an answer, and its number of tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(request | options), kind)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    if response.status != 200:
        raise SystemExit(f"a right request came back with {response.status}: {body}")
    if not stream:
        whole = json.loads(body)
        return whole["choices"][0]["text"], whole["usage"]["completion_tokens"]
    *parts, done = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
    assert done == "[DONE]"
    *chunks, last = map(json.loads, parts)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return text, last["usage"]["completion_tokens"]


def run(port: int, asked: list[dict], clients: int, seconds: float) -> dict:
    """Asks for so many seconds, and waits for the answers that are on their way."""
    numbers, answers, waits = itertools.count(), [], []
    begun = time.monotonic()

    def client() -> None:
        while time.monotonic() < begun + seconds:
            n = next(numbers)
            sent = time.monotonic()
            text, tokens = ask(port, asked[n % len(asked)], stream=n % 2 == 1)
            waits.append(time.monotonic() - sent)
            answers.append((n % len(asked), text, tokens))

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    taken, tokens = time.monotonic() - begun, sum(t for _, _, t in answers)
    waits.sort()
    return {
        "clients": clients,
        "answers": len(answers),
        "tokens": tokens,
        "seconds": round(taken, 2),
        "tokens_per_second": round(tokens / taken, 2),
        "median_wait": round(waits[len(waits) // 2], 2),
        "longest_wait": round(waits[-1], 2),
        "texts": answers,
    }


def send(port: int, data: bytes) -> int:
    """The status that some bytes are answered by."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
        s.sendall(data)
        return int(s.recv(12).split()[1])


def disturb(port: int, stop: threading.Event, statuses: collections.Counter) -> None:
    """What is no JSON, what is too large, and clients that leave, until `stop`."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    leaves = json.dumps({"prompt": "Once", "max_tokens": 60, "stream": True}).encode()
    while not stop.wait(0.2):
        statuses["malformed", send(port, head % 5 + b'{"a":')] += 1
        statuses["wrong field", send(port, head % 22 + b'{"prompt":"a","n":"5"}')] += 1
        statuses["oversized", send(port, head % (BODY_BYTES + 1) + b" " * 100)] += 1
        statuses["no HTTP", send(port, b"\x16\x03\x01 hello\r\n\r\n")] += 1
        with socket.create_connection(("127.0.0.1", port), timeout=600) as s:
            s.sendall(head % len(leaves) + leaves)
            statuses["left", int(s.recv(12).split()[1])] += 1


def health(port: int) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as response:
        return json.load(response)


EXPECTED = {"malformed": 400, "wrong field": 400, "oversized": 413, "no HTTP": 400, "left": 200}


def alone(folder: str, asked: list[dict], dtype: str) -> list[str]:
    """The texts that the generator makes, one prompt at a time."""
    import jax

    from lm_jax.config import MeshConfig
    from lm_jax.generation.decoding import Generator
    from lm_jax.generation.sampling import Sampling
    from lm_jax.sharding.mesh import make_mesh
    from lm_jax.training.inference import load_for_inference

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    loaded = load_for_inference(folder, mesh, dtype=dtype)
    generator, texts = Generator(loaded.model, loaded.tokenizer), []
    with jax.set_mesh(mesh):
        for request in asked:
            kinds = {
                key: request[key] for key in ("temperature", "top_k", "top_p") if key in request
            }
            sampling = Sampling(**({"top_k": 0} | kinds))
            arguments = {"max_tokens": request["max_tokens"], "seed": request["seed"]}
            texts += generator.generate([request["prompt"]], sampling=sampling, **arguments)
    return [completion.text for completion in texts]


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--model", required=True, help="a run's workdir or a Hugging Face folder")
    flags.add_argument("--clients", type=int, default=50)
    flags.add_argument("--seconds", type=float, default=120, help="for each of the two")
    flags.add_argument("--tokens", type=int, default=64, help="the most of an answer")
    flags.add_argument("--requests", type=int, default=24, help="different ones")
    flags.add_argument("--slots", type=int, default=16)
    flags.add_argument("--dtype", default="float32")
    given = flags.parse_args()
    asked = requests(given.requests, given.tokens)

    command = [sys.executable, "-m", "lm_jax.serve", f"--model={given.model}", "--port=0"]
    command += [f"--slots={given.slots}", f"--queue={2 * given.clients + 8}"]
    command += [f"--dtype={given.dtype}", f"--max_body_bytes={BODY_BYTES}"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if not line.startswith("serving"):
            raise SystemExit("the server did not start")
        port = int(line.rpartition(":")[2])
        run(port, asked, given.clients, 0.1)  # compiles
        one = run(port, asked, 1, given.seconds)
        stop, statuses = threading.Event(), collections.Counter()
        other = threading.Thread(target=disturb, args=(port, stop, statuses))
        other.start()
        many = run(port, asked, given.clients, given.seconds)
        stop.set()
        other.join()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            last = pool.submit(ask, port, asked[0], False)
            while not last.done() and not health(port)["running"]:
                time.sleep(0.01)
            server.send_signal(signal.SIGTERM)
            many["texts"].append((0, *last.result()))  # though the server was told to stop
        ended = server.wait(timeout=120)
    finally:
        server.kill()

    wanted = alone(given.model, asked, given.dtype)
    answers = one.pop("texts") + many.pop("texts")
    differ = {i for i, text, _ in answers if text != wanted[i]}
    same = sum(text == wanted[i] for i, text, _ in answers)
    wrong = sorted(f"{kind}: {status}" for kind, status in statuses if EXPECTED[kind] != status)
    ratio = many["tokens_per_second"] / one["tokens_per_second"]
    print("| clients | answers | tokens/s | median wait | longest wait |")
    print("|---|---|---|---|---|")
    for found in (one, many):
        print(
            f"| {found['clients']} | {found['answers']} | {found['tokens_per_second']} |"
            f" {found['median_wait']} s | {found['longest_wait']} s |"
        )
    print(f"\n{ratio:.2f} times the tokens a second; {same} of {len(answers)} answers are those of")
    print(
        f"the generator ({len(differ)} of {len(asked)} requests differ); the server ended: {ended}"
    )
    for (kind, status), count in sorted(statuses.items()):
        print(f"{kind:<12} {status}  x {count}")
    result = {
        "model": os.path.basename(os.path.normpath(given.model)),
        "one": one,
        "many": many,
        "ratio": round(ratio, 2),
        "answers": len(answers),
        "same": same,
        "requests_that_differ": sorted(differ),
        "refused": {
            kind: sum(n for (k, _), n in statuses.items() if k == kind) for kind in EXPECTED
        },
        "exit": ended,
    }
    print(json.dumps(result))
    if differ or wrong or ended:
        sys.exit(1)


if __name__ == "__main__":
    main()
