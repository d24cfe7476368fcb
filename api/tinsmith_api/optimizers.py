"""The optimizers that a run may be trained with, and what each step of theirs may be given."""

from typing import Any

from pydantic import Field, ValidationError

from tinsmith.errors import InvalidInput
from tinsmith_api.bodies import Strict, sentence

Json = dict[str, Any]

NAMES = ("adamw", "muon")


class Adam(Strict):
    learning_rate: float = Field(1e-4, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip_norm: float = Field(0.0, ge=0)


class Muon(Strict):
    learning_rate: float = Field(1e-3, ge=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(0.0, ge=0)
    grad_clip_norm: float = Field(0.0, ge=0)


def chosen(config: Json | None) -> str | None:
    """Its name; None if none is asked for. InvalidInput for one that is not known here."""
    if config is None:
        return None
    name = config.get("type", "adamw")
    if name == "dimuon":
        raise InvalidInput(
            "optimizer_config.type 'dimuon' is not supported: its definition is not published. Use "
            "'adamw', or 'muon', which is another optimizer"
        )
    if name not in NAMES:
        raise InvalidInput(f"optimizer_config.type {name!r} is not supported: use {' or '.join(NAMES)}")
    if odd := sorted(set(config) - {"type"}):
        raise InvalidInput(
            f"optimizer_config.{odd[0]} is not known here and would have no effect: leave it out"
        )
    return str(name)


def step_params(optimizer: str, adam: Adam | None, other: Json | None) -> Json:
    """What the worker is given; InvalidInput for parameters of another optimizer than the run's."""
    if optimizer == "adamw":
        if other is not None:
            raise InvalidInput("optimizer_params: this run is trained with adamw, send adam_params")
        return {"adam_params": (adam or Adam()).model_dump()}
    given = other or {}
    if adam is not None or given.get("type", optimizer) != optimizer:
        raise InvalidInput(f"this run is trained with {optimizer}: send optimizer_params of this type")
    try:
        return {"muon_params": Muon.model_validate(given).model_dump()}
    except ValidationError as error:
        raise InvalidInput(f"optimizer_params: {sentence(error)}") from None
