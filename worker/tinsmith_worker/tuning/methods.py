"""The PEFT library's methods: what each does to a model, and a model as it was again."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

from tinsmith.errors import InvalidInput
from tinsmith_worker.adapters import short_seed
from tinsmith_worker.contract import LoraSpec
from tinsmith_worker.tuning.weights import Form


class Wrapped:
    """A transformers model with a method's parameters in it, in the order of the form's names."""

    def __init__(self, model: Any, spec: LoraSpec, layers: list[nn.Module]) -> None:
        """InvalidInput for a method that is none, or does not fit this model."""
        config = _config(spec, model, layers)
        drawn_on = [parameter.device for parameter in model.parameters() if parameter.is_cuda][:1]
        # What is random follows from the seed, and nothing else that is random from this.
        with torch.random.fork_rng(drawn_on), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(short_seed(spec.seed))
            try:
                self._model: Any = peft.get_peft_model(model, config)
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                raise InvalidInput(f"method {spec.method!r} does not fit this base model: {error}") from None
        self._model.eval()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        saved = {t.data_ptr(): name for name, t in peft.get_peft_model_state_dict(self._model).items()}
        self.parameters: tuple[nn.Parameter, ...] = tuple(trained)
        self.form = Form(
            spec,
            tuple(saved[parameter.data_ptr()] for parameter in trained),
            tuple(parameter.detach().clone() for parameter in trained),
            _as_json(config),
        )

    def unwrap(self) -> None:
        """The model is as it was again."""
        self._model.unload()


def _config(spec: LoraSpec, model: Any, layers: list[nn.Module]) -> Any:
    where = _Targets(spec, model, layers)
    made: dict[str, Callable[..., Any]] = {
        "dora": lambda rank, alpha: peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_dora=True, target_modules=where.linears
        ),
        "oft": lambda block_size: peft.OFTConfig(
            r=0, oft_block_size=where.divisor_of_inputs(block_size), target_modules=where.linears
        ),
        "hra": lambda rank: peft.HRAConfig(r=rank, target_modules=where.linears),
        "vera": lambda rank: peft.VeraConfig(
            r=rank,
            target_modules=where.linears,
            projection_prng_key=short_seed(spec.seed),
            save_projection=False,
        ),
        "loha": lambda rank, alpha: peft.LoHaConfig(r=rank, alpha=alpha, target_modules=where.linears),
        "lokr": lambda rank, alpha: peft.LoKrConfig(r=rank, alpha=alpha, target_modules=where.linears),
        "ia3": lambda: peft.IA3Config(
            target_modules=where.keys_and_values + where.kept, feedforward_modules=where.kept
        ),
        "ln_tuning": lambda: peft.LNTuningConfig(target_modules=where.norms),
    }
    if spec.method not in made:
        raise InvalidInput(
            f"a single-tenant worker trains all weights (rank 0) or by {', '.join(made)}, not by "
            f"{spec.method!r}: LoRA is for workers that many tenants share"
        )
    config = made[spec.method](**spec.settings)
    config.task_type = peft.TaskType.CAUSAL_LM
    return config


class _Targets:
    """The names of modules as PEFT is told them, of those that the spec names."""

    def __init__(self, spec: LoraSpec, model: Any, layers: list[nn.Module]) -> None:
        attention, mlp = _linears(layers)
        attention, mlp = attention if spec.train_attn else {}, mlp if spec.train_mlp else {}
        self._trains_all = spec.train_attn and spec.train_mlp
        self._model = model
        self._widths = {linear.in_features for linear in (*attention.values(), *mlp.values())}
        self.linears = sorted({*attention, *mlp})
        self.keys_and_values = sorted({"k_proj", "v_proj"} & set(attention)) or sorted(attention)
        hidden = model.config.get_text_config().hidden_size
        # What an MLP keeps is what its last map is given.
        self.kept = sorted(name for name, linear in mlp.items() if linear.in_features != hidden)

    @property
    def norms(self) -> list[str]:
        if not self._trains_all:
            raise InvalidInput("ln_tuning trains all norms: leave train_attn and train_mlp true")
        norms = {
            path.rpartition(".")[2]
            for path, module in self._model.named_modules()
            if "norm" in type(module).__name__.lower() and not list(module.children())
        }
        return sorted(norms)

    def divisor_of_inputs(self, size: int) -> int:
        """PEFT would take the nearest that divides the inputs of a map."""
        if odd := [width for width in sorted(self._widths) if width % size]:
            raise InvalidInput(
                f"block_size {size} does not divide {odd[0]}, the inputs of a linear map of this base model"
            )
        return size


def _linears(layers: list[nn.Module]) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """By name one of each kind of linear map in attention and in the MLPs."""
    attention: dict[str, nn.Linear] = {}
    mlp: dict[str, nn.Linear] = {}
    for path, module in [pair for layer in layers for pair in layer.named_modules()]:
        if isinstance(module, nn.Linear):
            is_attention = any(word in path.lower() for word in ("attn", "attention"))
            (attention if is_attention else mlp)[path.rpartition(".")[2]] = module
    return attention, mlp


def _as_json(config: Any) -> str:
    """As PEFT saves it."""
    given = config.to_dict() | {"inference_mode": True}
    return json.dumps({name: sorted(v) if isinstance(v, set) else v for name, v in given.items()})
