"""What an operator can set: by command line, by environment (TINSMITH_<NAME>), or in a TOML file."""

import os
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from tinsmith_api.journal.objects import ObjectStore, open_store

DEFAULT_MODEL = "tinsmith/tiny"


class Prices(BaseModel):
    """US dollars per million tokens of one base model. Training is forward_backward and forward; what of a
    prompt was in the cache costs `prefill_cached`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    training: float = Field(0.0, ge=0)
    prefill: float = Field(0.0, ge=0)
    prefill_cached: float = Field(0.0, ge=0)
    sample: float = Field(0.0, ge=0)


class Settings(BaseSettings):
    """`models` maps the name clients use to a folder or a hub id; "tiny" is the built-in base.

    Without `redis` everything runs in one process tree (`tinsmith serve`); with it, on as many machines as
    there are, and `database` and `objects` must then be where all of them reach them.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="TINSMITH_")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data_dir: Path = Path("~/.tinsmith")
    models: dict[str, str] = {DEFAULT_MODEL: "tiny"}
    engine: Literal["torch", "null"] = "torch"
    deterministic: bool = False
    exact_logprobs: bool = False
    # What samples: the workers themselves, or a vLLM that each worker which samples starts, as this program
    # with these options of `vllm serve`.
    sampler: Literal["tinsmith", "vllm"] = "tinsmith"
    vllm: str = "vllm"
    pass_tokens: int = Field(8192, ge=64)
    # How a worker of several processes, one a GPU, holds its base: whole in each, or each a part of it.
    parallel: Literal["none", "fsdp2", "deepspeed"] = "none"
    nproc: int = Field(1, ge=1)
    offload: bool = False  # of a base in parts: the layers stay in host memory
    offload_folder: str = ""  # with deepspeed: they stay in this folder, on a fast disk
    quantize: Literal["", "nf4"] = ""  # nf4: the base's layers in four bits
    single_tenant: bool = False  # workers train one run each: all weights, or another method than LoRA
    gap_seconds: float = Field(600.0, gt=0)
    snapshot_seconds: float = Field(15.0, ge=0)
    # How long an object store that does not answer is asked, before a save or a load fails.
    storage_patience_seconds: float = Field(120.0, ge=0)
    # A run that nobody called for so long is snapshotted and let go of; its next call brings it back.
    idle_seconds: float = Field(600.0, gt=0)
    slot_bytes: int = Field(0, ge=0)  # 0: computed from what the machine has
    host_bytes: int = Field(0, ge=0)
    poll_seconds: float = Field(25.0, gt=0, lt=40)  # the official SDK hangs up after 45 s
    # Clients wait for all samples of a sampler with one call, and not with one for each: thousands at once
    # then need few connections, and each takes a call more.
    poll_by_sampler: bool = False
    max_forward_backward_bytes: int = 256 << 20
    max_sample_bytes: int = 64 << 20
    max_body_bytes: int = 1 << 20
    # What one tenant may have at once, unless `tinsmith admin tenants set` says otherwise.
    max_runs: int = Field(10_000, ge=1)
    max_queued: int = Field(20_000, ge=1)
    max_queued_bytes: int = Field(8 << 30, ge=1)
    # A client beats every 10 s. One that has not for so long is gone: its session is over.
    session_seconds: float = Field(86400.0, ge=60)

    database: SecretStr = SecretStr("")  # empty: SQLite in data_dir
    redis: SecretStr = SecretStr("")
    objects: str = ""  # a directory or s3://bucket/prefix; empty: a directory in data_dir
    s3_endpoint: str = ""
    # Where clients reach the server at s3_endpoint. Unless it is said, they download through the API.
    s3_public_endpoint: str = ""
    s3_region: str = ""
    s3_encryption: Literal["", "AES256", "aws:kms"] = ""
    s3_kms_key: str = ""
    # A worker that has not been heard of for so long is dead; its runs go to others.
    lease_seconds: float = Field(6.0, ge=1)
    metrics_port: int = Field(0, ge=0, le=65535)
    # Where clients reach this service, for links that it makes to itself; empty: where the request went.
    public_url: str = Field("", pattern=r"^(https?://[^\s?#]+)?$")
    # Clients exchange their key for a token of an hour, which is what `whoami` reads; keys go on working.
    jwt_auth: bool = False
    # What usage costs, by base model, and a gigabyte of checkpoints for 720 hours. Without prices only
    # tokens are counted.
    prices: dict[str, Prices] = {}
    price_per_gigabyte_month: float | None = Field(None, ge=0)
    scale_command: str = ""  # with {pool} and {count}; empty: processes on this machine

    @property
    def folder(self) -> Path:
        return self.data_dir.expanduser().resolve()

    @property
    def is_fleet(self) -> bool:
        return bool(self.redis.get_secret_value())

    def price(self, base_model: str | None, kind: str) -> float | None:
        """US dollars per million tokens of this kind (`journal.usage`); None if there is no price."""
        prices = self.prices.get(base_model or "")
        field = {"forward_backward": "training", "forward": "training"}.get(kind, kind)
        return None if prices is None or field not in Prices.model_fields else float(getattr(prices, field))

    @property
    def database_url(self) -> str:
        return self.database.get_secret_value() or f"sqlite:///{self.folder / 'journal.db'}"

    @property
    def objects_url(self) -> str:
        return self.objects or str(self.folder / "objects")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = os.environ.get("TINSMITH_CONFIG", "")
        in_file = (TomlConfigSettingsSource(settings_cls, Path(file)),) if file else ()
        return (init_settings, env_settings, *in_file)


def read_settings(file: Path | None = None, **given: object) -> Settings:
    """What was given (None: not given), else the environment, else `file`, else the defaults."""
    if file:
        if not file.is_file():
            raise ValueError(f"{file}: there is no such file")
        os.environ["TINSMITH_CONFIG"] = str(file)
    return Settings(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def open_objects(settings: Settings) -> ObjectStore:
    """Exits with a sentence if they cannot be reached."""
    try:
        return open_store(
            settings.objects_url,
            endpoint=settings.s3_endpoint,
            region=settings.s3_region,
            encryption=settings.s3_encryption,
            kms_key=settings.s3_kms_key,
            public_endpoint=settings.s3_public_endpoint,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"tinsmith: {error}")


def environment(settings: Settings) -> dict[str, str]:
    """What a worker is told by environment: where things are, secrets among it."""
    return {
        "TINSMITH_DATABASE": settings.database_url,
        "TINSMITH_REDIS": settings.redis.get_secret_value(),
        "TINSMITH_OBJECTS": settings.objects_url,
        "TINSMITH_S3_ENDPOINT": settings.s3_endpoint,
        "TINSMITH_S3_REGION": settings.s3_region,
        "TINSMITH_S3_ENCRYPTION": settings.s3_encryption,
        "TINSMITH_S3_KMS_KEY": settings.s3_kms_key,
    }


def worker_arguments(settings: Settings, base_model: str, path: str) -> list[str]:
    """The command line of `python -m tinsmith_worker`, but for what only its parent knows."""
    given = {
        "base-model": base_model,
        "path": path,
        "data-dir": settings.folder,
        "engine": settings.engine,
        "pass-tokens": settings.pass_tokens,
        "gap-seconds": settings.gap_seconds,
        "snapshot-seconds": settings.snapshot_seconds,
        "storage-patience-seconds": settings.storage_patience_seconds,
        "idle-seconds": settings.idle_seconds,
        "slot-bytes": settings.slot_bytes,
        "host-bytes": settings.host_bytes,
        "lease-seconds": settings.lease_seconds,
        "parallel": settings.parallel,
        "nproc": settings.nproc,
        "offload-folder": settings.offload_folder,
        "quantize": settings.quantize,
        "sampler": settings.sampler,
        "vllm": settings.vllm,
    }
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    flags = {
        "--deterministic": settings.deterministic,
        "--exact-logprobs": settings.exact_logprobs,
        "--offload": settings.offload,
        "--single-tenant": settings.single_tenant,
    }
    return [*arguments, *(flag for flag, given in flags.items() if given)]
