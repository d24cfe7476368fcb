"""What an operator can set: by command line, or in a TOML file with the same names."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_MODEL = "tinsmith/tiny"


class Settings(BaseModel):
    """`models` maps the name clients use to a folder or a hub id; "tiny" is the built-in base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    data_dir: Path = Path("~/.tinsmith")
    models: dict[str, str] = {DEFAULT_MODEL: "tiny"}
    engine: Literal["torch", "null"] = "torch"
    deterministic: bool = False
    pass_tokens: int = Field(8192, ge=64)
    gap_seconds: float = Field(600.0, gt=0)
    snapshot_seconds: float = Field(15.0, ge=0)
    poll_seconds: float = Field(25.0, gt=0, lt=40)  # the official SDK hangs up after 45 s
    max_forward_backward_bytes: int = 256 << 20
    max_sample_bytes: int = 64 << 20
    max_body_bytes: int = 1 << 20

    @property
    def folder(self) -> Path:
        return self.data_dir.expanduser().resolve()


def read_settings(file: Path | None, **given: object) -> Settings:
    """Settings from `file`, overridden by what was given (None: not given)."""
    from_file = tomllib.loads(file.read_text()) if file else {}
    return Settings(**{**from_file, **{k: v for k, v in given.items() if v is not None}})
