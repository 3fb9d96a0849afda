"""`Settings` of the server: by flags, environment variables `TOKENFLOW_SERVE_...` and a TOML file, in this order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from tokenflow_sdk.bundle.bundle import TINY
from tokenflow_sdk.errors import ArgumentError
from tokenflow_sdk.pictures.decode import MAX_PIXELS

__all__ = ["LOOPBACK", "NONE", "Settings", "read_keys", "settings_from"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NONE = "none"
"""Name of no generator and no understander."""


class Settings(BaseSettings):
    """What is served, to whom, and with which limits. Every field is a flag of `tokenflow serve` and a variable."""

    model_config = SettingsConfigDict(env_prefix="TOKENFLOW_SERVE_", extra="forbid", frozen=True)

    tokenizer: str = Field(default=TINY, description="bundle of the tokenizer")
    generator: str | None = Field(
        default=None,
        description="bundle of the generator, or `none` (default: `tiny` beside the tokenizer `tiny`)",
    )
    understander: str | None = Field(
        default=None,
        description="bundle of the understander, or `none` (default: `tiny` beside the tokenizer `tiny`)",
    )
    aliases: tuple[str, ...] = Field(default=("gpt-image-1",), description="other names that clients may ask any model by")
    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 is every network of this machine")
    port: int = Field(default=8080, ge=0, le=65535, description="port to listen at; 0 takes a free one")
    api_key_file: Path | None = Field(default=None, description="file of keys, one a line; requests must bring one")
    cors_origins: tuple[str, ...] = Field(
        default=(), description="origins of other pages that may call the server, e.g. https://a.example"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="host names that requests may be for (default: localhost at 127.0.0.1, else any)"
    )

    device: str = Field(
        default="auto", description="`auto`, `cpu`, `cuda` or `cuda:N`; with OpenVINO also `gpu`, `gpu:N` or `npu`"
    )
    backend: str = Field(default="auto", description="`auto`, `onnxruntime`, `openvino`, `tensorrt` or `tensorrt-rtx`")
    build_config: str | None = Field(default=None, description="build config, as for `tokenflow build`")
    serve_while_building: bool = Field(
        default=False, description="answer by onnxruntime until the TensorRT engines are built and certified"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of one call (default: all cores)")
    batch_limit: int | None = Field(default=None, ge=1, description="most pictures in one call (default: by the backend)")
    batch_wait_ms: float = Field(
        default=2.0, ge=0, le=1000, description="ms a picture waits for others, where calls take several"
    )
    pages: int | None = Field(
        default=None, ge=1, description="key/value pages of each language model (default: of eight requests)"
    )

    max_body_mb: float = Field(default=32.0, gt=0, description="largest body of a request, in 10^6 bytes")
    max_bodies_mb: float = Field(default=256.0, gt=0, description="bodies of all requests together")
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="pixels of the largest picture")
    max_images: int = Field(default=16, ge=1, description="most pictures, or codes of pictures, in a request")
    max_prompt_chars: int = Field(default=16_000, ge=1, description="characters of the longest prompt or conversation")
    max_queue: int = Field(default=128, ge=1, description="most requests under way; others are told to come later")
    timeout: float = Field(default=120.0, gt=0, description="seconds until a request is given up")
    body_timeout: float = Field(
        default=30.0,
        gt=0,
        description="seconds that the head and the body of a request may take to arrive, and its answer to be read",
    )
    drain: float = Field(
        default=30.0, ge=0, description="seconds that accepted requests have to finish after SIGTERM; others get 503 then"
    )
    access_log: bool = Field(default=True, description="write a line of JSON for each request to stderr")

    @field_validator("cors_origins", "allowed_hosts")
    @classmethod
    def _names_without_spaces(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not each.strip() or any(c.isspace() for c in each) for each in value):
            raise ValueError("each must be a name without spaces")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the TOML file if there is one."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host names that requests may be for. A server for this machine alone must not be called under names of others,
        which pages of strangers could let point to it."""
        return self.allowed_hosts or (LOOPBACK if self.host in LOOPBACK else ("*",))


def settings_from(values: dict[str, Any], file: Path | None = None) -> Settings:
    """Settings of flags, of the environment where there is no flag, and of a TOML file where there is neither.

    Raises:
        ArgumentError: a value cannot be used, or the file cannot be read.
    """
    try:
        if file is None:
            return Settings(**values)
        if not file.is_file():
            raise ArgumentError(f"There is no file {file} of settings.", "Give the path of a TOML file.")

        class FromFile(Settings):
            model_config = SettingsConfigDict(toml_file=file)

        return FromFile(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "settings"
        raise ArgumentError(
            f"{name}={first.get('input')!r} cannot be used: {first['msg'].removeprefix('Value error, ').lower()}.",
            "`tokenflow serve --help` lists all settings.",
        ) from error
    except SettingsError as error:
        # Only variables of several values are parsed; it tells which by the field's name in quotes.
        name = f"TOKENFLOW_SERVE_{str(error).split(chr(34))[1].upper()}"
        raise ArgumentError(f"The variable {name} is no JSON list.", f"""Write it as {name}='["one", "two"]'.""") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"The settings in {file} cannot be read: {error}.", "Give the path of a TOML file.") from error


def read_keys(file: Path | None) -> tuple[bytes, ...]:
    """The API keys in a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ArgumentError: it cannot be read, or has no key.
    """
    if file is None:
        return ()
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ArgumentError(f"The keys in {file} cannot be read: {why}.", "Give a text file with one key a line.") from error
    keys = tuple(line.encode() for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ArgumentError(f"There is no key in {file}.", "Write one a line, e.g. of `openssl rand -hex 32`.")
    return keys
