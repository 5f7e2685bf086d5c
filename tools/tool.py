"""One tool: what it is called, which JSON it takes and gives, and how to call it."""

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from hashlib import blake2b
from types import FunctionType
from typing import Any, NotRequired, Required, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from tools.context import ToolContext
from tools.errors import TerminalError

_MAX_REASONS = 5  # a list of a thousand wrong rows needs no thousand reasons


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a workflow may call.

    `version`: 16 hexadecimal digits that change with the tool's source or schemas. Schemas are JSON Schema
    2020-12; that of the arguments is always an object without additional properties.
    """

    name: str
    version: str
    description: str
    arguments_schema: Mapping[str, Any]
    result_schema: Mapping[str, Any]
    _function: Callable[..., Any] = field(repr=False)
    _arguments: TypeAdapter[dict[str, Any]] = field(repr=False)
    _result: TypeAdapter[Any] = field(repr=False)
    _context_parameter: str | None = field(repr=False)
    _is_async: bool = field(repr=False)

    async def call(self, arguments: Mapping[str, Any], context: ToolContext, executor: Executor | None = None) -> Any:
        """Call the function and return its result as a JSON value.

        Sync functions run in `executor` (the loop's own if none is given), async ones on the loop. Raises
        TerminalError for arguments that don't fit the schema or a result that JSON can't hold, and whatever the
        function raises. Cancelling stops an async function; a sync one runs on in its thread, unheard, unless it looks
        at `context.cancelled()`.
        """
        try:
            if not self._is_async:
                return await asyncio.get_running_loop().run_in_executor(executor, self._call_sync, arguments, context)
            return self._dump(await self._function(**self._validate(arguments, context)))
        except asyncio.CancelledError:
            context.cancel()
            raise

    def _call_sync(self, arguments: Mapping[str, Any], context: ToolContext) -> Any:
        # Checking and dumping stay in the thread: large rows would hold up the loop.
        try:
            return self._dump(self._function(**self._validate(arguments, context)))
        except StopIteration as error:  # as a coroutine does: no future takes one, who waits for it would wait for ever
            raise RuntimeError(f"{self.name} raised StopIteration") from error

    def _validate(self, arguments: Mapping[str, Any], context: ToolContext) -> dict[str, Any]:
        try:
            validated = self._arguments.validate_python(arguments)
        except ValidationError as error:
            raise TerminalError(f"wrong arguments for {self.name}: {_reasons(error)}") from error
        if self._context_parameter is not None:
            validated[self._context_parameter] = context
        return validated

    def _dump(self, result: Any) -> Any:
        try:
            value = self._result.dump_python(result, mode="json", warnings="error")
            # Pydantic lets NaN and Infinity pass; JSON has neither and readers elsewhere would fail on them.
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise TerminalError(f"{self.name} returned what JSON can't hold: {' '.join(str(error).split())}") from error
        return value


def describe(function: FunctionType, *, name: str, version_of: bytes) -> Tool:
    """Return the tool that `function` is; `version_of` is what its version depends on besides the schemas.

    Raises TypeError if a parameter or the result has no type hint, if a parameter can't be given by name, or if a
    type has no JSON form.
    """
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    context_parameter: str | None = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in hints:
            raise TypeError(f"tool {name}: parameter {parameter.name!r} has no type hint")
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"tool {name}: parameter {parameter.name!r} can't be given by name")
        if hints[parameter.name] is ToolContext:
            context_parameter = parameter.name
        elif parameter.default is parameter.empty:
            fields[parameter.name] = Required[hints[parameter.name]]
        else:
            fields[parameter.name] = NotRequired[hints[parameter.name]]
            defaults[parameter.name] = parameter.default
    if "return" not in hints:
        raise TypeError(f"tool {name}: the result has no type hint")
    try:
        # A TypedDict, not a model: it has no attribute names of its own that a parameter could collide with, and
        # an argument that is left out stays out, so that the function's own default applies.
        arguments: TypeAdapter[dict[str, Any]] = TypeAdapter(
            with_config(ConfigDict(extra="forbid"))(TypedDict(name, fields))  # type: ignore[operator]
        )
        result: TypeAdapter[Any] = TypeAdapter(hints["return"])
        arguments_schema = arguments.json_schema()
        for parameter_name, default in defaults.items():
            value = TypeAdapter(hints[parameter_name]).dump_python(default, mode="json")
            arguments_schema["properties"][parameter_name]["default"] = value
        result_schema = result.json_schema(mode="serialization")
    except PydanticSchemaGenerationError as error:
        raise TypeError(f"tool {name}: {error.message}") from error
    schemas = json.dumps([arguments_schema, result_schema], sort_keys=True, default=str).encode()
    return Tool(
        name=name,
        version=blake2b(version_of + schemas, digest_size=8).hexdigest(),
        description=inspect.getdoc(function) or "",
        arguments_schema=arguments_schema,
        result_schema=result_schema,
        _function=function,
        _arguments=arguments,
        _result=result,
        _context_parameter=context_parameter,
        _is_async=inspect.iscoroutinefunction(function),
    )


def _reasons(error: ValidationError) -> str:
    """Say in one line what is wrong and where, without echoing values: they may be large or secret."""
    reasons = [
        f"{'.'.join(str(part) for part in reason['loc']) or 'arguments'}: {reason['msg']}"
        for reason in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    more = f"; and {len(reasons) - _MAX_REASONS} more" if len(reasons) > _MAX_REASONS else ""
    return "; ".join(reasons[:_MAX_REASONS]) + more
