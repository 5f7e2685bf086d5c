"""All settings: environment variables `FOLDFLOW_*`, or the same names in lower case in `foldflow.toml`.

Source of the defaults: DESIGN (topics, partitions) and what `foldflow up` starts (addresses).
"""

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

PREFIX: Final = "FOLDFLOW_"
FILE: Final = "foldflow.toml"


class SettingsFileError(ValueError):
    """The file of the settings can't be read; the message says why, and where in it."""


class Environment(EnvSettingsSource):
    """The environment variables.

    What should be JSON and isn't stays a text: it is judged with all other settings, not alone and before them.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Take an empty variable of a setting without a default for one that isn't set."""
        value, key, is_complex = super().get_field_value(field, field_name)
        return None if value == "" and field.default is None else value, key, is_complex

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """Decode lists and objects alone: a path may be a number."""
        if not value.lstrip().startswith(("[", "{")):
            return value
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def _separated(value: object) -> object:
    """Return the paths that a text names, as in PATH; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        raise ValueError("begins like JSON and isn't")
    return tuple(path for path in value.split(os.pathsep) if path)


Paths = Annotated[tuple[Path, ...], BeforeValidator(_separated)]


class Settings(BaseSettings):
    """Where Kafka, the model and the data are, and how the processors behave."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, toml_file=FILE, extra="forbid", frozen=True)

    bootstrap_servers: str = Field(
        "127.0.0.1:29092",
        description="Kafka's addresses, `host:port[,host:port…]`; "
        "`foldflow up` starts a broker for each if all are this machine's loopback.",
    )
    kafka: dict[str, str] = Field(
        {},
        description='Further librdkafka properties for every client, as JSON: `{"security.protocol": "SSL"}`.',
    )
    schema_registry: dict[str, str] = Field(
        {},
        description="A schema registry where schemas are registered, and whose ids are used, as JSON of its client's properties: "
        '`{"url": "https://…", "basic.auth.user.info": "user:password"}`.',
    )
    json_mirror: bool = Field(
        False, description="Whether `foldflow up` starts the role `mirror`: `decisions` as JSON on the topic `decisions.json`."
    )
    topic_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]*$")] = Field(
        "foldflow.",
        description="Put before every topic's and consumer group's name, so that several installations can share a cluster.",
    )
    partitions: Annotated[int, Field(ge=1, le=1000)] = Field(
        8, description="Partitions of `inbox` and `decisions`; fixed for good when the topics are made."
    )
    replication_factor: Annotated[int, Field(ge=1)] = Field(
        1,
        description="Replicas of each topic: 1 for one embedded broker (`foldflow up` sets 3 for three), 3 elsewhere.",
    )
    session_timeout_ms: Annotated[int, Field(ge=1000)] = Field(
        10_000, description="After how long a silent processor's partitions go to another, in milliseconds."
    )
    stuck_after_s: Annotated[float, Field(ge=1)] = Field(
        150.0,
        description="After how long a process that could go on and doesn't ends by itself, to be started anew, in seconds.",
    )
    idle_after_s: Annotated[float, Field(ge=0.1)] = Field(
        30.0, description="After how long a run that waits leaves the orchestrator's memory, with a snapshot, in seconds."
    )
    data_dir: Path = Field(
        Path(".foldflow"), description="Folder of everything kept on this machine: Kafka's log, views, reports, logs."
    )
    payload_store: Annotated[str, Field(pattern=r"^(s3|gs|az|file)://")] | None = Field(
        None,
        description="Where JSON above 256 KB is kept, if not in `payloads` in the data folder (one machine only): "
        "`s3://bucket/prefix`, `gs://…`, `az://…` or `file:///…`.",
    )
    model: str = Field(
        "local/smollm2",
        description="Model for steps that name none, in LiteLLM's spelling; `local/…` is served by `foldflow up`.",
    )
    local_model_url: str = Field(
        "http://127.0.0.1:29093", description="Where `local/…` models are served, OpenAI-compatible below `/v1`."
    )
    prices: Path | None = Field(
        None, description="File of your own model prices (YAML or JSON), which come before LiteLLM's; read when a worker starts."
    )
    llm_concurrency: Annotated[int, Field(ge=1)] = Field(16, description="LLM calls in flight per worker.")
    tool_concurrency: Annotated[int, Field(ge=1)] = Field(128, description="Tool calls in flight per worker.")
    breaker_calls: Annotated[int, Field(ge=0, le=1000)] = Field(
        20, description="Last calls of a model or tool by which a worker judges whether it is down; 0: never."
    )
    breaker_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8,
        description="Share of those that must have failed (no connection, status 5xx, no answer in time) until it is left alone.",
    )
    breaker_open_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0, description="Seconds until one call tries it again; twice as long each time that fails, up to a minute."
    )
    tool_paths: Paths = Field(
        (),
        description="Python files with further tools (each public typed function is one), as in PATH or as a JSON list: "
        '`my_tools.py:/srv/more_tools.py` or `["my_tools.py", "/srv/more_tools.py"]`.',
    )
    workflow_paths: Paths = Field(
        (),
        description="Further workflow definitions (YAML files or folders of them), as in PATH or as a JSON list: "
        '`my_workflow.yaml:/srv/workflows` or `["my_workflow.yaml", "/srv/workflows"]`.',
    )
    api_host: str = Field("127.0.0.1", description="Address on which the read API and the gateway listen.")
    api_port: Annotated[int, Field(ge=1, le=65535)] = Field(29094, description="Port of the read API.")
    gateway_port: Annotated[int, Field(ge=1, le=65535)] = Field(29095, description="Port of the gateway.")
    api_tokens: Path | None = Field(
        None,
        description="File of the tokens that the read API and the gateway ask for (`foldflow token`); "
        "without it both only answer this machine.",
    )
    api_token: SecretStr | None = Field(None, description="Token that our own commands show the read API.")
    api_rate: Annotated[float, Field(ge=0)] = Field(
        200, description="Requests a second for each token (without tokens: address), for a moment twice as many; 0: no limit."
    )
    api_streams: Annotated[int, Field(ge=1)] = Field(100, description="Live streams that the read API serves at once.")
    ready_file: Path | None = Field(None, description="File that a process creates once it is ready; set by `foldflow up`.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level that is logged.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment, then `foldflow.toml`."""
        del env_settings, dotenv_settings, file_secret_settings
        try:
            file = TomlConfigSettingsSource(settings_cls)
        except ValueError as error:  # its bytes are no UTF-8, or its text no TOML
            raise SettingsFileError(f"{FILE} is no TOML: {error}") from error
        except OSError as error:
            raise SettingsFileError(f"{FILE} can't be read: {error.strerror}") from error
        return (init_settings, Environment(settings_cls), file)
