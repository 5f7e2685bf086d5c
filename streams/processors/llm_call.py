"""One attempt at asking a model, through LiteLLM: an `LlmCall` in, its result out. Nothing is tried twice here.

Whatever happens ends as a result with a failure kind, so that the orchestrator decides what follows; only cancellation passes.
LiteLLM takes seconds and 120 MB to import, so where no call was ever made it isn't imported before the first one.
"""

import asyncio
import functools
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any, Final

import jsonschema
import referencing

from events.calls import LlmCall, LlmCallRequested
from events.failure import Failure, FailureKind
from events.results import LlmCallCompleted, LlmCallFailed
from streams import payloads
from streams.processors import prices
from streams.processors.prices import LOCAL
from streams.settings import Settings
from streams.workflow.expressions import EvaluationError, Json, clean_text, from_json, to_json
from streams.workflow.payloads import INLINE_BYTES, MARK, PayloadError, utf8_size

_PARAMETERS: Final = frozenset({"max_tokens", "temperature", "top_p", "seed", "stop"})
"""What a call may set. Anything else could send the worker's keys elsewhere (`api_base`)."""
_CLIENT_TIMEOUT_S: Final = 86_400.0
"""The HTTP client's own limit, the same for all calls: LiteLLM keeps a client, with its open connections, for each timeout.
The limit that counts is the call's deadline."""
_MAX_RETRY_AFTER_MS: Final = 86_400_000


class UnusableError(Exception):
    """The attempt failed for a reason of our own: `failure`."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(kind, clean_text(message))


@functools.cache
def load() -> Any:
    """Import LiteLLM, without network or `.env` files, and return it. Takes three seconds: call it in a thread."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a price list, and its version says nothing of prices
    os.environ.setdefault("LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS", "True")  # else it fetches one at Claude's first call
    os.environ.setdefault("LITELLM_MODE", "PRODUCTION")  # else it loads the nearest .env of the folder or those above
    litellm: Any = importlib.import_module("litellm")
    importlib.import_module("openai.resources")  # 0.7 s that the event loop would stand still at the first call
    litellm.suppress_debug_info = True  # else errors print adverts to stdout
    litellm.disable_hf_tokenizer_download = True
    litellm.num_retries = 0
    return litellm


async def close() -> None:
    """Close the connections to the providers; call it when the worker stops, in the loop that made the calls."""
    if load.cache_info().currsize:
        await load().close_litellm_async_clients()
        load().in_memory_llm_clients_cache.flush_cache()  # else a later loop with the same id() is given a closed client


def endpoint(model: str, settings: Settings) -> str:
    """Return what is behind a model, by a name for people: those with the same name are up or down together."""
    return f"{model} at {settings.local_model_url}" if model.startswith(LOCAL) else model


def _unheard(_: Failure | None) -> None:
    """Tell nobody."""


async def ask(
    call: LlmCall,
    settings: Settings,
    store: payloads.PayloadStore | None = None,
    told: Callable[[Failure | None], None] = _unheard,
    own: prices.Prices = prices.NONE,
) -> LlmCallCompleted | LlmCallFailed:
    """Make one attempt and return its result. Raises nothing but `asyncio.CancelledError`, which ends the request as well.

    `store`: where large messages and answers are, the settings' if none is given. `told` hears how the provider did, once it was
    asked: None if it answered, whatever that was worth. `own`: prices of one's own.
    """
    started = time.perf_counter()
    model = call.request.model or settings.model
    usage, cost, by = None, None, None
    try:
        if not load.cache_info().currsize:
            await asyncio.to_thread(load)
            started = time.perf_counter()  # it was not the provider's time
        litellm = load()
        store = store or payloads.PayloadStore(settings)
        request = await _resolved(call.request, store) if MARK in call.request.messages else call.request
        response = await _answer(litellm, request, model, settings, told)
        usage = prices.usage_of(response)
        cost, by = prices.paid(litellm, response, model, usage, own)
        output, finish_reason = usable_output(response, request.schema)
        if utf8_size(output) > INLINE_BYTES:
            output = await store.inlined(output)
        provider = "local" if model.startswith(LOCAL) else str(litellm.get_llm_provider(model)[1])
        answered = clean_text(response.model or model)
        return LlmCallCompleted(
            call.call_id, call.request.step, output, answered, provider, finish_reason, usage, cost, _since(started), by
        )
    except UnusableError as error:
        failure = error.failure
    except PayloadError as error:
        failure = payloads.failure(error)
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        failure = _failure(RuntimeError(f"the client gave up by itself: {error!r}"))
    except Exception as error:  # noqa: BLE001 — LiteLLM and the providers behind it raise anything; each becomes a kind
        failure = _failure(error)
    return LlmCallFailed(call.call_id, call.request.step, failure, clean_text(model), usage, cost, _since(started), by)


async def _resolved(request: LlmCallRequested, store: payloads.PayloadStore) -> LlmCallRequested:
    """Return a request with its messages as they are, not by reference. Raises UnusableError or PayloadError."""
    try:
        return replace(request, messages=to_json(await store.resolve(request.messages)))
    except EvaluationError as error:
        raise UnusableError(FailureKind.INVALID_ARGUMENTS, f"not to be asked: {str(error)[:300]}") from error


def _since(started: float) -> int:
    return round((time.perf_counter() - started) * 1000)


async def _answer(
    litellm: Any, request: LlmCallRequested, model: str, settings: Settings, told: Callable[[Failure | None], None]
) -> Any:
    """Return LiteLLM's ModelResponse. Raises UnusableError, or whatever LiteLLM raises."""
    arguments = _arguments(litellm, request, model, settings)
    remaining = request.deadline / 1000 - time.time()
    if remaining <= 0:
        raise UnusableError(FailureKind.TIMEOUT, f"the time for it was over {-remaining:.1f} s before the model was asked")
    limit = asyncio.timeout(remaining)
    try:
        async with limit:
            try:
                response = await litellm.acompletion(**arguments)
            except litellm.UnsupportedParamsError:
                # Nothing was sent yet. Not for every call: with it LiteLLM asks again on status 422, then returns None.
                response = await litellm.acompletion(**arguments, drop_params=True)
    except Exception as error:
        if limit.expired():  # whatever LiteLLM made of the cancellation
            late = UnusableError(FailureKind.TIMEOUT, f"no answer within {remaining:.1f} s")
            told(late.failure)
            raise late from error
        told(_failure(error))
        raise
    told(None)
    return response


def _arguments(litellm: Any, request: LlmCallRequested, model: str, settings: Settings) -> dict[str, Any]:
    """Return the arguments of `acompletion`."""
    try:
        messages = from_json(clean_text(json.dumps(from_json(request.messages), ensure_ascii=False)))
        parameters = from_json(request.parameters)
        if request.schema is not None:
            _validator(request.schema)
    except (EvaluationError, jsonschema.SchemaError) as error:
        raise UnusableError(FailureKind.INVALID_ARGUMENTS, f"not to be asked: {str(error)[:300]}") from error
    if not isinstance(messages, list) or not isinstance(parameters, dict):
        raise UnusableError(FailureKind.INVALID_ARGUMENTS, "messages must be a list and parameters an object")
    if unknown := sorted(parameters.keys() - _PARAMETERS):
        raise UnusableError(FailureKind.INVALID_ARGUMENTS, f"this worker knows no parameter {', '.join(unknown)}")
    where: dict[str, Any] = {"model": model}
    if model.startswith(LOCAL):
        base = f"{settings.local_model_url.rstrip('/')}/v1"
        where = {"model": f"openai/{model.removeprefix(LOCAL)}", "api_base": base, "api_key": "none"}
    if request.schema is not None:
        where |= _asking_for(litellm, model, from_json(request.schema), messages)
    # Retries are decisions of the orchestrator: neither LiteLLM nor the provider's client may make their own.
    return parameters | where | {"messages": messages, "num_retries": 0, "max_retries": 0, "timeout": _CLIENT_TIMEOUT_S}


def _asking_for(litellm: Any, model: str, schema: Json, messages: list[Json]) -> dict[str, Any]:
    """Return the response format that asks for JSON of this schema; where the provider can't take one, add a message instead."""
    is_object = isinstance(schema, dict) and schema.get("type") == "object"
    if model.startswith(LOCAL) or (is_object and litellm.supports_response_schema(model=model)):
        answer = {"name": "answer", "schema": schema, "strict": _fits_strict_mode(schema)}
        return {"response_format": {"type": "json_schema", "json_schema": answer}}
    messages.append({"role": "user", "content": f"Answer with nothing but JSON that fits this JSON Schema: {to_json(schema)}"})
    known = litellm.get_supported_openai_params(model=model) or ()
    return {"response_format": {"type": "json_object"}} if is_object and "response_format" in known else {}


_STRICT: Final = frozenset(
    {"additionalProperties", "description", "enum", "items", "maximum", "minimum", "properties", "required", "title", "type"}
)


def _fits_strict_mode(schema: Json) -> bool:
    """Whether OpenAI's strict mode surely takes a schema: typed throughout, objects closed, every property required."""
    if not isinstance(schema, dict) or "type" not in schema or schema.keys() - _STRICT:
        return False
    properties = schema.get("properties", {})
    is_closed = schema.get("additionalProperties") is False and set(properties) == set(schema.get("required", ()))
    parts = [*properties.values(), *([schema["items"]] if "items" in schema else [])]
    return (is_closed or "object" not in schema["type"]) and all(_fits_strict_mode(part) for part in parts)


def usable_output(response: Any, schema: str | None) -> tuple[str, str]:
    """Return the answer as canonical JSON, and why the model stopped. Raises UnusableError."""
    if not getattr(response, "choices", None):
        raise UnusableError(FailureKind.INVALID_OUTPUT, "the provider's answer holds no choice")
    choice = response.choices[0]
    finish_reason = clean_text(choice.finish_reason or "unknown")
    refusal = getattr(choice.message, "refusal", None)
    if refusal or finish_reason == "content_filter":
        raise UnusableError(FailureKind.REJECTED, f"the model refused: {refusal or 'its content filter stepped in'}")
    text = choice.message.content
    if not isinstance(text, str):
        raise UnusableError(FailureKind.INVALID_OUTPUT, f"the model gave no text; it stopped because of `{finish_reason}`")
    if schema is None:
        output = to_json(text)
    elif finish_reason == "length":
        raise UnusableError(FailureKind.INVALID_OUTPUT, "the answer reached its longest length (max_tokens) and is cut off")
    else:
        output = _fitting(text, schema)
    return output, finish_reason


_FENCED: Final = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
"""Models that are only asked for JSON like to wrap it so."""


def _fitting(text: str, schema: str) -> str:
    """Return the answer parsed, checked against the schema and in canonical form. Raises UnusableError."""
    fenced = _FENCED.fullmatch(text)
    try:
        value = from_json(fenced[1] if fenced else text)
        error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(value))
        canonical = to_json(value)
    except (EvaluationError, RecursionError) as error_in_answer:
        raise UnusableError(FailureKind.INVALID_OUTPUT, f"the answer is {error_in_answer}") from error_in_answer
    except referencing.exceptions.Unresolvable as error_in_schema:
        raise UnusableError(FailureKind.INVALID_ARGUMENTS, f"the schema refers to {error_in_schema}") from error_in_schema
    if error is not None:
        where = ".".join(["answer", *map(str, error.absolute_path)])
        raise UnusableError(FailureKind.INVALID_OUTPUT, f"the answer doesn't fit its schema: {where}: {error.message[:300]}")
    return canonical


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    """Return what checks answers. Raises EvaluationError or jsonschema.SchemaError."""
    parsed = from_json(schema)
    jsonschema.Draft202012Validator.check_schema(parsed)
    # With a registry of its own it doesn't fetch what a `$ref` names from the network.
    return jsonschema.Draft202012Validator(parsed, registry=referencing.Registry())


# --- Failures ---

_CAUSES: Final[dict[FailureKind, tuple[str | int, ...]]] = {
    FailureKind.CONTEXT_TOO_LONG: ("ContextWindowExceededError", "context_length_exceeded", "exceed_context_size_error"),
    FailureKind.REJECTED: ("ContentPolicyViolationError", "content_policy_violation", "content_filter"),
    FailureKind.UNAUTHORIZED: ("AuthenticationError", "PermissionDeniedError", 401, 402, 403),
    FailureKind.RATE_LIMITED: ("RateLimitError", 429),
    FailureKind.TIMEOUT: ("APITimeoutError", "TimeoutError", 408, 504),
    FailureKind.UNAVAILABLE: ("APIConnectionError", "InternalServerError", 409, 425),
    FailureKind.TOO_LARGE: (413,),
    FailureKind.INVALID_ARGUMENTS: ("BadRequestError", "NotFoundError", "UnprocessableEntityError", *range(400, 500)),
}
"""By the provider's code, else by LiteLLM's class or the nearest above it, else by HTTP status (the first kind counts)."""
_KINDS: Final = {cause: kind for kind, causes in reversed([*_CAUSES.items()]) for cause in causes}
_SECRET: Final = re.compile(r"(?<=[?&]key=)[^&\s'\"]+|\b(?:sk|pk|gsk|xai|key)-[\w-]{12,}|\bAIza[\w-]{20,}|(?<=Bearer )\S+")
_PREFIX: Final = re.compile(r"^(?:(?:litellm\.)?(?:\w*Error|\w*Exception|Timeout(?: Error)?)(?:: | - | ))+")


def _failure(error: Exception) -> Failure:
    """Return what an exception of LiteLLM means. A cause that nobody foresaw counts as unavailable: it may pass."""
    codes = [str(getattr(error, name, None)) for name in ("code", "type")]  # LiteLLM itself goes by words in the message
    status = getattr(error, "status_code", None)
    causes = [*codes, *(each.__name__ for each in type(error).__mro__), status if isinstance(status, int) else 0]
    kind = next((_KINDS[cause] for cause in causes if cause in _KINDS), FailureKind.UNAVAILABLE)
    message = _SECRET.sub("…", _PREFIX.sub("", str(error)))
    retry_after = _retry_after_ms(error) if kind in {FailureKind.RATE_LIMITED, FailureKind.UNAVAILABLE} else None
    return Failure(kind, clean_text(f"{type(error).__name__}: {message}")[:500], retry_after)


def _retry_after_ms(error: Exception) -> int | None:
    """Return how long the provider asks to wait, in milliseconds, a day at most."""
    headers = getattr(error, "litellm_response_headers", None) or getattr(getattr(error, "response", None), "headers", None)
    if not isinstance(headers, Mapping):
        return None
    try:
        if text := headers.get("retry-after-ms"):
            wait = float(text)
        elif text := headers.get("retry-after"):
            seconds = re.fullmatch(r"\d+(\.\d+)?", text.strip())
            wait = 1000 * (float(text) if seconds else parsedate_to_datetime(text).timestamp() - time.time())
        else:
            return None
        return round(min(max(wait, 0), _MAX_RETRY_AFTER_MS))
    except (ValueError, OverflowError):  # neither a number nor a date
        return None
