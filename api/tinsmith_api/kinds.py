"""What a run trains: LoRA, which many tenants' runs share a worker with, or something that needs it alone."""

import secrets
from typing import Any

from pydantic import Field

from tinsmith.errors import InvalidInput
from tinsmith.wire import methods
from tinsmith_api.bodies import Strict
from tinsmith_api.service import Facts

Json = dict[str, Any]


class LoraConfig(Strict):
    rank: int = 32
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class TuningConfig(Strict):
    """A method of `tinsmith.wire.methods`, for single-tenant workers. `settings` are the method's own."""

    method: str
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    train_mlp: bool = True
    train_attn: bool = True
    settings: Json = Field(default_factory=dict)


def of_lora(given: LoraConfig, base_model: str, facts: Facts) -> Json:
    """What the run's row says of it. Rank 0 is full fine-tuning. InvalidInput for what this base model's
    workers do not train."""
    if given.rank == 0:
        if not (given.train_attn and given.train_mlp and given.train_unembed):
            raise InvalidInput(
                "lora_config.rank 0 is full fine-tuning, which trains everything: leave train_attn, "
                "train_mlp and train_unembed true"
            )
        return _checked({**_fixed(given), "method": "full"}, base_model, facts)
    if not 1 <= given.rank <= facts.max_rank:
        raise InvalidInput(f"lora_config.rank is {given.rank}: it must be between 1 and {facts.max_rank}")
    if not (given.train_attn or given.train_mlp or given.train_unembed):
        raise InvalidInput("lora_config trains nothing: set train_attn, train_mlp or train_unembed")
    return _checked(_fixed(given), base_model, facts)


def of_method(given: TuningConfig, base_model: str, facts: Facts) -> Json:
    settings = methods.settings_of(given.method, given.settings)
    if given.method == "full":
        whole = LoraConfig(rank=0, seed=given.seed, train_attn=given.train_attn, train_mlp=given.train_mlp)
        return of_lora(whole, base_model, facts)
    if not (given.train_attn or given.train_mlp):
        raise InvalidInput("tuning_config trains nothing: set train_attn or train_mlp")
    where = {"train_attn": given.train_attn, "train_mlp": given.train_mlp, "train_unembed": False}
    lora = _fixed(LoraConfig(rank=0, seed=given.seed, **where))
    return _checked({**lora, "method": given.method, "settings": settings}, base_model, facts)


def check(lora: Json, base_model: str, facts: Facts) -> None:
    """InvalidInput if this base model's workers do not train such runs."""
    is_alone = method(lora) != "lora"
    if is_alone and not facts.single_tenant:
        raise InvalidInput(
            f"{base_model} is served by workers that many tenants share, and they train LoRA: "
            f"method {method(lora)!r} needs a single-tenant pool (tinsmith serve --single-tenant, or "
            "tinsmith worker --single-tenant, under a base model's name of its own)"
        )
    if not is_alone and facts.single_tenant:
        raise InvalidInput(
            f"{base_model} is served by single-tenant workers, which train all weights (rank 0) or a method "
            f"of tuning_config ({', '.join(methods.METHODS)}): LoRA is for pools that many tenants share"
        )


def check_optimizer(lora: Json, optimizer: str) -> None:
    if optimizer != "adamw" and method(lora) != "lora":
        raise InvalidInput(
            f"optimizer_config.type {optimizer!r} steps the matrices of LoRA: a run of method "
            f"{method(lora)!r} takes 'adamw'"
        )


def method(lora: Json) -> str:
    return str(lora.get("method", "lora"))


def told(lora: Json) -> Json:
    """What clients are told of it."""
    if method(lora) == "lora":
        return {"is_lora": True, "lora_rank": lora["rank"]}
    about = {"method": method(lora), "settings": lora.get("settings", {})}
    return {"is_lora": False, "lora_rank": None, "tuning_config": about}


def _checked(lora: Json, base_model: str, facts: Facts) -> Json:
    check(lora, base_model, facts)
    return lora


def _fixed(given: LoraConfig) -> Json:
    """With a seed, so that a replay makes the same weights."""
    return {**given.model_dump(), "seed": secrets.randbits(48) if given.seed is None else given.seed}
