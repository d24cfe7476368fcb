"""`tinsmith train`: what a YAML file may say. The words are those of Axolotl, TRL and LLaMA-Factory where
they agree."""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import pydantic
import yaml

from tinsmith_cookbook import recipes

RECIPES = sorted(module.name for module in pkgutil.iter_modules(recipes.__path__))


class BadConfig(ValueError):  # noqa: N818 - says what it is
    """A file that cannot be trained from. The message names the key and what to change."""


class Dataset(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    path: Path
    type: Literal["alpaca", "sharegpt", "chat", "preference"] | None = None


_ALWAYS = {"base_model", "rl", "adapter", "lora_r", "learning_rate", "micro_batch_size"} | {
    "gradient_accumulation_steps",
    "max_steps",
    "seed",
    "output_dir",
    "report_to",
    "export",
}
_PREFERENCES = {"datasets", "val_set_size", "lr_scheduler", "warmup_ratio", "max_grad_norm", "num_epochs"} | {
    "eval_steps",
    "beta",
}
# What each kind of training makes use of; what it would not is refused, not ignored.
_OF_RECIPES = {"recipe", "options", "base_model", "seed", "output_dir", "report_to", "max_steps"}
_USED = {
    None: _ALWAYS
    | _PREFERENCES - {"beta"}
    | {"sequence_len", "sample_packing", "early_stopping_patience", "save_steps"},
    "dpo": _ALWAYS | _PREFERENCES,
    "kto": _ALWAYS | _PREFERENCES,
    "orpo": _ALWAYS | _PREFERENCES,
    "grpo": _ALWAYS | {"num_generations"},
}


class Config(pydantic.BaseModel):
    """`micro_batch_size` × `gradient_accumulation_steps` examples make a step; the service cuts them into
    passes of its own, so only the product counts. Alpha is the service's (32).

    `recipe` runs one of the cookbook instead, with the `options` of its command line."""

    model_config = pydantic.ConfigDict(extra="forbid")

    base_model: str = "tinsmith/tiny"
    recipe: str | None = None
    options: dict[str, bool | float | int | str | list[float | int | str]] = {}
    rl: Literal["dpo", "kto", "orpo", "grpo"] | None = None
    datasets: list[Dataset] = []
    sequence_len: int = pydantic.Field(512, ge=8)
    sample_packing: bool = False
    val_set_size: float = pydantic.Field(0.1, ge=0, lt=1)

    adapter: Literal["lora"] = "lora"
    lora_r: int = pydantic.Field(16, ge=1, le=512)

    learning_rate: float | None = pydantic.Field(None, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = pydantic.Field(0.08, ge=0, lt=1)
    max_grad_norm: float = pydantic.Field(0.0, ge=0)
    micro_batch_size: int = pydantic.Field(16, ge=1)
    gradient_accumulation_steps: int = pydantic.Field(1, ge=1)
    num_epochs: float | None = pydantic.Field(None, gt=0)
    max_steps: int | None = pydantic.Field(None, ge=1)

    beta: float = pydantic.Field(0.1, gt=0)
    num_generations: int = pydantic.Field(8, ge=2)

    eval_steps: int = pydantic.Field(10, ge=1)
    early_stopping_patience: int = pydantic.Field(3, ge=1)
    save_steps: int = pydantic.Field(25, ge=1)
    seed: int = 0
    output_dir: Path = Path("runs/train")
    report_to: list[Literal["wandb", "mlflow", "tensorboard"]] = []
    export: Literal["peft", "merged"] | None = None

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.recipe is not None:
            if self.recipe not in RECIPES:
                raise ValueError(f"there is no recipe {self.recipe!r}: there are {', '.join(RECIPES)}")
            if unused := sorted(self.model_fields_set - _OF_RECIPES):
                raise ValueError(f"with a recipe {', '.join(unused)} goes under options, if it has that")
            read_options(self.recipe, self.options)
            return self
        how = f"rl: {self.rl}" if self.rl else "supervised training"
        if self.learning_rate is None:
            raise ValueError("learning_rate is missing")
        if self.rl == "grpo" and self.datasets:
            raise ValueError("rl: grpo makes its own problems: leave datasets out")
        if unused := sorted(self.model_fields_set - _USED[self.rl]):
            raise ValueError(f"{how} makes no use of {', '.join(unused)}: leave it out")
        if (self.num_epochs is None) == (self.max_steps is None):
            raise ValueError("give num_epochs or max_steps, one of them")
        if self.rl != "grpo" and not self.datasets:
            raise ValueError("datasets is missing: a list of {path, type}")
        kinds = {dataset.type for dataset in self.datasets}
        if self.rl in ("dpo", "kto", "orpo"):
            if len(self.datasets) > 1 or kinds - {None, "preference"}:
                raise ValueError(f"{how} takes one dataset, of type preference: prompt, chosen, rejected")
            if self.val_set_size == 0:
                raise ValueError(f"{how} is judged by held-out pairs: val_set_size must be above 0")
        elif "preference" in kinds:
            raise ValueError("a dataset of type preference needs rl: dpo, kto or orpo")
        return self

    @property
    def batch(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps


def read_options(recipe: str, said: Mapping[str, Any]) -> list[str]:
    """What a recipe's command line takes, as its arguments. Raises ValueError."""
    arguments: list[str] = []
    for name, value in said.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in _WORDS_OF_ALL:
            raise ValueError(f"options: {name} is called {_WORDS_OF_ALL[flag]} here, and stands by itself")
        if isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif value is not False:
            arguments += [flag] if value is True else [flag, str(value)]
    parser = importlib.import_module(f"tinsmith_cookbook.recipes.{recipe}").parser()

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"options of {recipe}: {message}")

    parser.error, parser.allow_abbrev = refuse, False
    parser.parse_args(arguments)
    return arguments


_WORDS_OF_ALL = {
    "--base": "base_model",
    "--steps": "max_steps",
    "--seed": "seed",
    "--out": "output_dir",
    "--track": "report_to",
}


def read(file: Path) -> Config:
    """Paths of datasets are as the file sees them. Raises BadConfig."""
    try:
        said = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadConfig(f"{file} cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise BadConfig(f"{file} is not a list of `key: value`")
    try:
        config = Config.model_validate(said)
    except pydantic.ValidationError as error:
        raise BadConfig("\n".join(f"{file.name}: {_sentence(one)}" for one in error.errors())) from None
    for dataset in config.datasets:
        dataset.path = file.parent / dataset.path
        if not dataset.path.exists():
            raise BadConfig(f"{file.name}: datasets: {dataset.path} does not exist")
    return config


# What people write who come from another trainer, and what it is called here.
_ELSEWHERE = {
    "lora_alpha": "alpha is fixed by the service (32); scale the learning rate instead",
    "lora_dropout": "there is no dropout",
    "lora_target_modules": "all linear layers are trained",
    "lora_target_linear": "all linear layers are trained, always",
    "load_in_4bit": "how the base is held is the service's business: `tinsmith serve`",
    "load_in_8bit": "how the base is held is the service's business: `tinsmith serve`",
    "bf16": "the service's base model decides it",
    "fp16": "the service's base model decides it",
    "optimizer": "it is AdamW",
    "model_name_or_path": "it is called base_model here",
    "per_device_train_batch_size": "it is called micro_batch_size here",
    "num_train_epochs": "it is called num_epochs here",
    "lr_scheduler_type": "it is called lr_scheduler here",
    "warmup_steps": "give warmup_ratio, a share of the steps",
    "lora_rank": "it is called lora_r here",
    "cutoff_len": "it is called sequence_len here",
    "max_seq_length": "it is called sequence_len here",
    "dataset": "it is called datasets here, a list of {path, type}",
    "val_size": "it is called val_set_size here",
}


def _sentence(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = ", ".join(Config.model_fields)
        return f"{key}: " + _ELSEWHERE.get(key, f"there is no such key. The keys are {known}")
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
