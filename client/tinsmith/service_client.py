"""The door to a service: opens a session, and makes clients that train or sample."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from tinsmith.connection import GIVE_UP_SECONDS, WIRE_VERSION, Connection
from tinsmith.errors import InvalidInput, TinsmithError
from tinsmith.future import Future, awaited
from tinsmith.sampling_client import SamplingClient, SamplingClientFuture
from tinsmith.session import Session
from tinsmith.threads import Threads
from tinsmith.training_client import TrainingClient, TrainingClientFuture
from tinsmith.types import (
    AdamOptimizerConfig,
    CustomLossInputRank,
    GetServerCapabilitiesResponse,
    LoraConfig,
    OptimizerConfig,
)

if TYPE_CHECKING:
    from tinsmith.custom_loss import LossHandle, PerDatumLossFn
    from tinsmith.rest_client import RestClient

FinishReason = Literal["success", "errored", "interrupted"]


class ServiceClient:
    """A connection to one service. Makes no request until it has to.

    base_url comes from TINSMITH_BASE_URL or TINKER_BASE_URL when left out (else http://127.0.0.1:8000),
    api_key from TINSMITH_API_KEY or TINKER_API_KEY. Calls raise what `tinsmith.errors` lists; those that
    meet a service which is away repeat themselves for `give_up_seconds`. `progress` False hides how long
    waits go on, `heartbeat` True or False overrules whether a thread tells the service that we live.
    """

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        give_up_seconds: float = GIVE_UP_SECONDS,
        progress: bool | None = None,
        heartbeat: bool | None = None,
    ) -> None:
        session: dict[str, Any] = {
            "tags": [tag for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag],
            "user_metadata": dict(user_metadata or {}),
            "sdk_version": WIRE_VERSION,
            "project_id": project_id or os.environ.get("TINKER_PROJECT_ID") or None,
            "display_name": display_name,
        }
        self._connection = Connection(
            base_url,
            api_key,
            give_up_seconds=give_up_seconds,
            headers=default_headers_overrides,
            progress=progress,
        )
        self._session = Session(self._connection, session, heartbeat)

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClientFuture:
        """A new run: a fresh LoRA adapter on `base_model`. seed None: a random one."""
        lora = LoraConfig(
            rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed
        )
        fields = {
            "base_model": base_model,
            "lora_config": {name: value for name, value in asdict(lora).items() if value is not None},
            "user_metadata": user_metadata,
            "optimizer_config": asdict(optimizer or AdamOptimizerConfig()),
        }
        return TrainingClient.open(self._session, "create_model", lambda: fields)

    def create_full_training_client(
        self,
        base_model: str,
        user_metadata: Mapping[str, Any] | None = None,
    ) -> TrainingClientFuture:
        """A new run that trains all weights of `base_model`, on a worker of its own: the base model must have
        a single-tenant pool."""
        fields = {
            "base_model": base_model,
            "lora_config": {"rank": 0},
            "user_metadata": user_metadata,
            "optimizer_config": asdict(AdamOptimizerConfig()),
        }
        return TrainingClient.open(self._session, "create_model", lambda: fields)

    def create_peft_training_client(
        self,
        base_model: str,
        method: str,
        settings: Mapping[str, int] | None = None,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        user_metadata: Mapping[str, Any] | None = None,
    ) -> TrainingClientFuture:
        """A new run that trains `base_model` by another method of the PEFT library than LoRA, as in
        `create_peft_training_client(model, "oft", {"block_size": 16})`; `tinsmith.wire.methods` lists them
        with their settings. On a worker of its own: the base model must have a single-tenant pool."""
        tuning = {
            "method": method,
            "train_mlp": train_mlp,
            "train_attn": train_attn,
            "settings": dict(settings or {}),
            **({} if seed is None else {"seed": seed}),
        }
        fields = {
            "base_model": base_model,
            "tuning_config": tuning,
            "user_metadata": user_metadata,
            "optimizer_config": asdict(AdamOptimizerConfig()),
        }
        return TrainingClient.open(self._session, "create_model", lambda: fields)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | None = None,
    ) -> TrainingClientFuture:
        """A new run that starts from a checkpoint's weights, with a fresh optimizer."""
        fields = {
            "path": path,
            "optimizer": False,
            "base_model": base_model,
            "user_metadata": user_metadata,
            "weights_access_token": weights_access_token,
            "optimizer_config": optimizer and asdict(optimizer),
        }
        return TrainingClient.open(self._session, "load_weights", lambda: fields)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: Mapping[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClientFuture:
        """A new run that goes on exactly where the checkpoint's left off."""
        fields = {
            "path": path,
            "optimizer": True,
            "base_model": base_model,
            "user_metadata": user_metadata,
            "weights_access_token": weights_access_token,
        }
        return TrainingClient.open(self._session, "load_weights", lambda: fields)

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
    ) -> SamplingClientFuture:
        """A sampler of saved weights (`tinker://…/sampler_weights/…`), or of a base model as it is.
        `retry_config` is the official SDK's and changes nothing here."""
        if model_path is None and base_model is None:
            raise InvalidInput("give either model_path or base_model")
        return SamplingClient.open(self._session, model_path, base_model, record_stability_info)

    def create_custom_loss(
        self, fn: "PerDatumLossFn", input_ranks: Mapping[str, CustomLossInputRank]
    ) -> "Future[LossHandle]":
        """A loss of one datum for `forward_backward_custom`: `fn(logprobs, *inputs)` returns a scalar tensor
        and metrics. `input_ranks` names its parameters, `logprobs` first. Computed here, in torch."""
        from tinsmith.custom_loss import LossHandle

        if next(iter(input_ranks), "") != "logprobs":
            raise InvalidInput("a custom loss takes `logprobs` first: name it first in input_ranks")
        handle = LossHandle(getattr(fn, "__name__", "loss"), fn, dict(input_ranks))
        return Future(lambda _: handle, self._connection.waiters)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> Future[str]:
        """A copy of a checkpoint that is yours, in this session's project; its path."""
        return self.create_rest_client().copy_weights(
            path, ttl_seconds=ttl_seconds, weights_access_token=weights_access_token
        )

    def create_rest_client(self) -> "RestClient":
        """A client of the service's records, over this connection."""
        from tinsmith.rest_client import RestClient

        return RestClient(self._connection)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models this service knows. Needs no session."""
        return self.create_rest_client().get_server_capabilities().result()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        return await self.create_rest_client().get_server_capabilities()

    def get_console_url(self) -> str:
        """Where the service tells of this session, with a key."""
        return f"{self._connection.base_url}/api/v1/sessions" + (
            f"/{self._session.id}" if self._session.is_open else ""
        )

    create_lora_training_client_async = awaited(create_lora_training_client)
    create_full_training_client_async = awaited(create_full_training_client)
    create_peft_training_client_async = awaited(create_peft_training_client)
    create_training_client_from_state_async = awaited(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = awaited(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = awaited(create_sampling_client)

    def close(self, status: FinishReason = "success", detail: str | None = None) -> Future[None]:
        """Finish the session; every client made from this one is closed with it."""

        def finish() -> None:
            try:
                self._session.finish(status, detail)
            finally:
                self._connection.close()

        # In a thread of its own: the connection's end with it.
        done = self._connection.run(finish, Threads(1))
        return Future(lambda _: done.result(), Threads(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close().result()
        else:
            with contextlib.suppress(TinsmithError):  # what matters is the error that ended the block
                self.close("errored" if isinstance(error, Exception) else "interrupted", repr(error)).result()
