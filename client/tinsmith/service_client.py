"""The door to a service: opens a session, and makes clients that train or sample."""

import itertools
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self

from tinsmith.connection import GIVE_UP_SECONDS, Connection
from tinsmith.errors import InvalidInput
from tinsmith.future import Future
from tinsmith.sampling_client import SamplingClient
from tinsmith.training_client import TrainingClient
from tinsmith.types import GetServerCapabilitiesResponse, SupportedModel

FinishReason = Literal["success", "errored", "interrupted"]


class ServiceClient:
    """A connection to one service. Makes no request until it has to.

    base_url comes from TINSMITH_BASE_URL or TINKER_BASE_URL when left out (else http://127.0.0.1:8000),
    api_key from TINSMITH_API_KEY or TINKER_API_KEY. Calls raise what `tinsmith.errors` lists; those that
    meet a service which is away repeat themselves for `give_up_seconds`.
    """

    def __init__(
        self,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        give_up_seconds: float = GIVE_UP_SECONDS,
    ) -> None:
        session: dict[str, Any] = {
            "tags": [],
            "user_metadata": dict(user_metadata or {}),
            "sdk_version": "tinsmith",
            "project_id": project_id,
            "display_name": display_name,
        }
        self._connection = Connection(base_url, api_key, session, give_up_seconds)
        self._runs = itertools.count()
        self._samplers = itertools.count()

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, Any] | None = None,
    ) -> Future[TrainingClient]:
        """A new run: a fresh LoRA adapter on `base_model`. seed None: a random one."""
        lora = {
            "rank": rank,
            "seed": seed,
            "train_mlp": train_mlp,
            "train_attn": train_attn,
            "train_unembed": train_unembed,
        }
        fields = {
            "base_model": base_model,
            "lora_config": {name: value for name, value in lora.items() if value is not None},
            "user_metadata": user_metadata,
            "optimizer_config": {"type": "adamw"},
        }
        return self._connection.start(self._create_run("create_model", next(self._runs), fields))

    def create_training_client_from_state(
        self, path: str, base_model: str | None = None, user_metadata: Mapping[str, Any] | None = None
    ) -> Future[TrainingClient]:
        """A new run that starts from a checkpoint's weights, with a fresh optimizer."""
        fields = {"path": path, "optimizer": False, "base_model": base_model, "user_metadata": user_metadata}
        return self._connection.start(self._create_run("load_weights", next(self._runs), fields))

    def create_training_client_from_state_with_optimizer(
        self, path: str, base_model: str | None = None, user_metadata: Mapping[str, Any] | None = None
    ) -> Future[TrainingClient]:
        """A new run that goes on exactly where the checkpoint's left off."""
        fields = {"path": path, "optimizer": True, "base_model": base_model, "user_metadata": user_metadata}
        return self._connection.start(self._create_run("load_weights", next(self._runs), fields))

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        *,
        record_stability_info: bool = False,
    ) -> Future[SamplingClient]:
        """A sampler of saved weights (`tinker://…/sampler_weights/…`), or of a base model as it is."""
        if (model_path is None) == (base_model is None):
            raise InvalidInput("give either model_path or base_model")
        return self._connection.start(
            SamplingClient.create(
                self._connection, next(self._samplers), model_path, base_model, record_stability_info
            )
        )

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The base models this service knows. Needs no session."""
        answer = self._connection.start(self._connection.get("get_server_capabilities")).result()
        return GetServerCapabilitiesResponse(
            [
                SupportedModel(model.get("model_name"), model.get("max_context_length"))
                for model in answer["supported_models"]
            ]
        )

    def close(self, status: FinishReason = "success", detail: str | None = None) -> Future[None]:
        """Finish the session; every client made from this one is closed with it."""
        return self._connection.start(self._connection.close(status, detail))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close().result()
        else:
            self.close("errored" if isinstance(error, Exception) else "interrupted", repr(error)).result()

    async def _create_run(self, path: str, number: int, fields: Mapping[str, Any]) -> TrainingClient:
        session_id = await self._connection.session_id()
        named = {"session_id": session_id, "model_seq_id": number, **fields}
        promise = await self._connection.submit(path, named)
        await self._connection.result(promise["request_id"])
        # The wire fixes how a run is named.
        return await TrainingClient.create(self._connection, f"{session_id}:train:{number}", self._samplers)
