"""Serves a model over HTTP as OpenAI's interface: python -m lm_jax.serve --model=DIR

POST /v1/completions and /v1/chat/completions, GET /v1/models and /health, and a page to chat at /.
Ctrl-C or SIGTERM lets running answers end, then stops; once more stops at once.
"""

import os
import signal
import sys
import threading

from absl import flags

from lm_jax import cli
from lm_jax.errors import UserError

_MODEL = cli.define_model_flag()
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint; default: the newest.", lower_bound=0)
_DTYPE = cli.define_dtype_flag()
_QUANTIZE = cli.define_quantize_flag()
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices to split the model over.", 1)
_NAME = flags.DEFINE_string("name", None, "What clients call the model; default: its folder.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Where to listen; 0.0.0.0: to the whole network.")
_ALLOW_HOST = flags.DEFINE_multi_string(
    "allow_host",
    [],
    "A name that clients know this server by, besides its address, localhost, --host and this"
    " machine's own; may be repeated. '*': any.",
)
_PORT = flags.DEFINE_integer("port", 8000, "0 finds a free one.", 0, 65535)
_SLOTS = flags.DEFINE_integer("slots", 16, "Answers to generate at a time.", 1, 1024)
_QUEUE = flags.DEFINE_integer("queue", 64, "Answers that may wait for a slot.", 0, 100_000)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens of prompt and answer; default: the model's longest, at most 2048."
)
_MAX_PROMPT_TOKENS = flags.DEFINE_integer("max_prompt_tokens", None, "Default: --max_length.", 1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", None, "Of an answer; default: --max_length.", 1)
_MAX_BODY_BYTES = flags.DEFINE_integer("max_body_bytes", 1_000_000, "Of a request.", 1)
_REQUEST_TIMEOUT = flags.DEFINE_float("request_timeout", 600.0, "Seconds for an answer.", 0.1)
_STOP_SECONDS = flags.DEFINE_float("stop_seconds", 30.0, "For running answers to end in.", 0.0)


def main(argv: list[str]) -> None:
    del argv
    path = cli.model_of(_MODEL)

    with cli.importing():
        import jax

        from lm_jax import runtime
        from lm_jax.config import MeshConfig
        from lm_jax.data.chat import chat_template_for
        from lm_jax.serving.http import Server
        from lm_jax.serving.scheduler import Scheduler
        from lm_jax.serving.service import Limits, Service
        from lm_jax.sharding.mesh import make_mesh
        from lm_jax.training.inference import load_for_inference
    runtime.configure()

    if _TENSOR.value > jax.device_count():
        raise UserError(
            f"--tensor={_TENSOR.value}: this machine has {jax.device_count()} device(s)"
        )
    mesh = make_mesh(MeshConfig(data=1, tensor=_TENSOR.value), jax.devices()[: _TENSOR.value])
    loaded = load_for_inference(path, mesh, _STEP.value, _DTYPE.value, _QUANTIZE.value)
    scheduler = Scheduler(
        loaded.model,
        loaded.tokenizer,
        slots=_SLOTS.value,
        waiting=_QUEUE.value,
        max_length=_MAX_LENGTH.value,
        mesh=mesh,
        donate=True,
    )
    limits = Limits(
        max_body_bytes=_MAX_BODY_BYTES.value,
        max_prompt_tokens=_MAX_PROMPT_TOKENS.value,
        max_tokens=_MAX_TOKENS.value,
        request_timeout=_REQUEST_TIMEOUT.value,
        connections=_SLOTS.value + _QUEUE.value + 64,  # some of them idle, or about to be refused
    )
    name = _NAME.value or os.path.basename(os.path.abspath(path))
    template = chat_template_for(loaded.tokenizer, loaded.config.data.objective)
    service = Service(scheduler, name, template, limits)
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def caught(number: int, _frame) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)  # once more ends it at once
        stop.set()

    for number in before:
        signal.signal(number, caught)
    try:
        server = Server(service, _HOST.value, _PORT.value, _ALLOW_HOST.value)
    except OSError as e:
        raise UserError(f"--host={_HOST.value} --port={_PORT.value}: {e.strerror or e}") from None
    service.warm_up()
    print(f"serving '{name}' at {server.address}", flush=True)
    stop.wait()
    print("stopping: running answers may end", file=sys.stderr, flush=True)
    server.stop(_STOP_SECONDS.value)


if __name__ == "__main__":
    cli.run(main)
