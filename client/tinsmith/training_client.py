"""A run: one adapter being trained, through the primitive calls."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from tinsmith import custom_loss, runs
from tinsmith.connection import JSON, PROTOBUF, Sent, given, read_json
from tinsmith.custom_loss import CustomLoss, LossHandle
from tinsmith.errors import InvalidInput, ServiceUnavailable
from tinsmith.future import ClientFuture, Future, awaited, left, submitted
from tinsmith.messages import MAX_BYTES, MAX_DATUMS, merge, pack, unpack
from tinsmith.sampling_client import SamplingClient, SamplingClientFuture
from tinsmith.session import Session
from tinsmith.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFn,
    ModelData,
    ModelInput,
    OptimParams,
    OptimStepResponse,
    SamplingClientKind,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tinsmith.wire import tinsmith_pb2 as pb

if TYPE_CHECKING:
    from tinsmith.tokenizer import Tokenizer

Made = TypeVar("Made")
_PROTOBUF_BODY = {"Content-Type": PROTOBUF}
_JSON_BODY = {"Content-Type": JSON}
# What `fork` saves on its way lives so long.
_PASSING_SECONDS = 86400


class TrainingClient:
    """Each call is numbered and sent before its method returns a future, so that an optim_step can be on its
    way while its forward_backward still runs; the service executes them in the order of their numbers:

        forward_backward = training.forward_backward(data, "cross_entropy")
        optim_step = training.optim_step(AdamParams(learning_rate=1e-4))
        print(forward_backward.result().metrics["loss:sum"], optim_step.result().metrics)

    In a thread that runs an event loop they are sent from another thread; the numbers keep their order.
    """

    def __init__(self, session: Session, info: GetInfoResponse) -> None:
        self.model_id = info.model_id
        self._info = info
        self._session = session
        self._connection = session.connection
        self._seq_ids = itertools.count(1)

    @classmethod
    def open(
        cls, session: Session, path: str, fields: Callable[[], Mapping[str, Any]]
    ) -> "TrainingClientFuture":
        """A new run of `session`; asked for at once. `path` is create_model or load_weights."""
        number, connection = next(session.runs), session.connection

        def ask() -> Sent:
            named = {"session_id": session.id, "model_seq_id": number, **fields()}
            return connection.send("POST", path, json=given(named), fatal=(402,))

        asked = connection.promised(ask)

        def fetch(until: float | None) -> TrainingClient:
            connection.result(asked(until), until=until)
            # The wire fixes how a run is named.
            return cls(
                session, _info(connection.post("get_info", {"model_id": f"{session.id}:train:{number}"}))
            )

        return TrainingClientFuture(fetch, connection.waiters)

    def forward(
        self, data: Sequence[Datum], loss_fn: LossFn, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Losses and logprobs; the accumulated gradient stays as it is."""
        sent = []
        for request in self._pack(data, loss_fn, loss_fn_config, forward_only=True):
            with self._numbered(request) as body:
                sent += [
                    self._connection.send("POST", "forward_backward", content=body, headers=_PROTOBUF_BODY)
                ]
        return self._output(sent)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: LossFn, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Losses and logprobs; adds the gradient of the summed loss to the accumulated one."""
        sent = []
        for request in self._pack(data, loss_fn, loss_fn_config):
            with self._numbered(request) as body:
                sent += [
                    self._connection.send("POST", "forward_backward", content=body, headers=_PROTOBUF_BODY)
                ]
        return self._output(sent)

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: CustomLoss | LossHandle,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
        arrays: Literal["torch", "numpy"] = "torch",
    ) -> Future[ForwardBackwardOutput]:
        """A loss of your own over the targets' logprobs, computed here; two passes on the service.

        arrays="torch": loss_fn(data, logprobs) gets one tensor per datum that requires grad, and returns
        (loss, metrics). arrays="numpy": it gets float32 arrays and returns (loss, gradients, metrics),
        gradients[i] being dloss/dlogprobs[i]. Returns once the second pass is submitted; in an event loop at
        once. `loss_type_input` is the official SDK's, and has one value.
        """
        if loss_type_input not in (None, "logprobs"):
            raise InvalidInput(f"a custom loss gets logprobs, not {loss_type_input!r}")
        requests = self._pack(
            [custom_loss.for_logprobs(datum) for datum in data], "cross_entropy", None, True
        )
        # Taken now: calls made later come after both passes, whatever the loss does meanwhile.
        forward = list(itertools.islice(self._seq_ids, len(requests)))
        backward = list(itertools.islice(self._seq_ids, len(requests)))
        unsent = {*forward, *backward}

        def send(request: pb.ForwardBackwardRequest, seq_id: int) -> Sent:
            sent = self._send_pass(request, seq_id)
            unsent.discard(seq_id)
            return sent

        def run() -> tuple[Future[ForwardBackwardOutput], float, dict[str, float]]:
            try:
                seen = self._output(list(map(send, requests, forward))).result()
                logprobs = [output["logprobs"].to_numpy() for output in seen.loss_fn_outputs]
                differentiate = (
                    custom_loss.differentiate_torch if arrays == "torch" else custom_loss.differentiate_numpy
                )
                loss, gradients, metrics = differentiate(loss_fn, data, logprobs)
                surrogate = iter(map(custom_loss.for_gradient, data, gradients))
                chunks = [
                    pack(list(itertools.islice(surrogate, len(request.data))), "cross_entropy")[0]
                    for request in requests
                ]
                return self._output(list(map(send, chunks, backward))), loss, metrics
            except ServiceUnavailable:
                raise  # asked again, the calls go on under their numbers
            except BaseException:
                self._skip(unsent)
                raise

        passed = self._connection.promised(run)

        def fetch(until: float | None) -> ForwardBackwardOutput:
            answer, loss, metrics = passed(until)
            output = answer.result(left(until))
            own = {"surrogate_loss:sum": output.metrics["loss:sum"], "loss:sum": loss, **metrics}
            return replace(output, metrics={**output.metrics, **own})

        return Future(fetch, self._connection.waiters)

    def logprobs(self, inputs: Sequence[ModelInput | Sequence[int]]) -> Future[list[npt.NDArray[np.float32]]]:
        """Of each input's N tokens the logprob given those before it, under the weights as they are after the
        calls made so far: [N], NaN for the first. No gradient."""
        tokens = [x.to_ints() if isinstance(x, ModelInput) else list(x) for x in inputs]
        data = [
            Datum(ModelInput.from_ints(t[:-1]), {"target_tokens": t[1:], "weights": [1.0] * (len(t) - 1)})
            for t in tokens
        ]
        return self.forward(data, "cross_entropy").then(
            lambda output: [
                np.concatenate([[np.nan], one["logprobs"].to_numpy()]).astype(np.float32)
                for one in output.loss_fn_outputs
            ]
        )

    def optim_step(
        self, optim_params: OptimParams | None = None, *, adam_params: AdamParams | None = None
    ) -> Future[OptimStepResponse]:
        """One step with the accumulated gradient, which it clears; AdamW unless the run has another
        optimizer. `adam_params` is the older name of `optim_params`."""
        params = optim_params or adam_params or AdamParams()
        field = "adam_params" if isinstance(params, AdamParams) else "optimizer_params"
        with self._named({field: asdict(params)}) as body:
            sent = self._connection.send("POST", "optim_step", content=body, headers=_JSON_BODY)
        return self._promise(sent, lambda answer: OptimStepResponse(answer.get("metrics")))

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Future[SaveWeightsResponse]:
        """A checkpoint of weights and optimizer, `tinker://{run}/weights/{name}`."""
        fields = {
            "path": name,
            "ttl_seconds": ttl_seconds,
            "overwrite": overwrite,
            "user_metadata": user_metadata,
        }
        with self._named(fields) as body:
            sent = self._connection.send("POST", "save_weights", content=body, headers=_JSON_BODY)
        return self._promise(sent, lambda answer: SaveWeightsResponse(answer["path"]))

    def load_state(self, path: str, weights_access_token: str | None = None) -> Future[LoadWeightsResponse]:
        """Take over a checkpoint's weights; the optimizer starts anew."""
        fields = {"path": path, "optimizer": False, "weights_access_token": weights_access_token}
        with self._named(fields) as body:
            sent = self._connection.send("POST", "load_weights", content=body, headers=_JSON_BODY)
        return self._promise(sent, lambda answer: LoadWeightsResponse(answer.get("path"), self.model_id))

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> Future[LoadWeightsResponse]:
        """Go on exactly where the checkpoint left off."""
        fields = {"path": path, "optimizer": True, "weights_access_token": weights_access_token}
        with self._named(fields) as body:
            sent = self._connection.send("POST", "load_weights", content=body, headers=_JSON_BODY)
        return self._promise(sent, lambda answer: LoadWeightsResponse(answer.get("path"), self.model_id))

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> Future[SaveWeightsForSamplerResponse]:
        """Freeze the weights under `tinker://{run}/sampler_weights/{name}`."""
        fields = {
            "path": name,
            "kind": "snapshot",
            "ttl_seconds": ttl_seconds,
            "user_metadata": user_metadata,
        }
        with self._named(fields) as body:
            sent = self._connection.send("POST", "save_weights_for_sampler", content=body, headers=_JSON_BODY)
        return self._promise(sent, lambda answer: SaveWeightsForSamplerResponse(answer["path"]))

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> Future[SaveWeightsExternalResponse]:
        """The adapter as files that other programs load, under `tinker://{run}/external_weights/{name}`; see
        `export` to have them here."""
        fields = {
            "path": name,
            "ttl_seconds": ttl_seconds,
            "age_encryption_recipients": age_encryption_recipients,
        }
        with self._named(fields) as body:
            sent = self._connection.send("POST", "save_weights_external", content=body, headers=_JSON_BODY)
        return self._promise(
            sent,
            lambda answer: SaveWeightsExternalResponse(answer["path"], size_bytes=answer.get("size_bytes")),
        )

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: object = None,
        record_stability_info: bool = False,
        kind: SamplingClientKind = "snapshot",
    ) -> SamplingClientFuture:
        """A sampler of the weights as they are after the calls made so far; training on leaves it alone.
        `name` and `retry_config` are the official SDK's and change nothing, there as here."""
        fields = {"kind": kind, "sampling_session_seq_id": next(self._session.samplers)}
        with self._named(fields) as body:
            sent = self._connection.send("POST", "save_weights_for_sampler", content=body, headers=_JSON_BODY)

        def fetch(until: float | None) -> SamplingClient:
            sampler_id = read_json(self._connection.result(sent, until=until))["sampling_session_id"]
            base_model = self._info.model_data.model_name
            return SamplingClient(self._connection, sampler_id, base_model, record_stability_info)

        return SamplingClientFuture(fetch, self._connection.waiters)

    def create_sampling_client(
        self, model_path: str, retry_config: object = None, record_stability_info: bool = False
    ) -> SamplingClientFuture:
        """As ServiceClient.create_sampling_client."""
        return SamplingClient.open(self._session, model_path, None, record_stability_info)

    def fork(self, checkpoint: str | int | None = None) -> "TrainingClientFuture":
        """A new run that goes on exactly where this one is after the calls made so far, or was at a
        `checkpoint`: its path, its name, or the number at the end of its name."""
        saved = None
        if checkpoint is None:
            saved = self.save_state(f"fork-{time.time_ns():x}", ttl_seconds=_PASSING_SECONDS)

        def fields() -> dict[str, Any]:
            if saved is not None:
                path = saved.result().path
            else:
                assert checkpoint is not None
                path = runs.find_checkpoint(self._connection, self.model_id, checkpoint)
            return {"path": path, "optimizer": True}

        return TrainingClient.open(self._session, "load_weights", fields)

    def metrics(self) -> runs.Table:
        """One row per finished call of this run: its losses or gradient norm, tokens, seconds."""
        return runs.metrics(self._connection, self.model_id)

    def cost(self) -> runs.Cost:
        """What this run has used so far."""
        return runs.cost(self._connection, self.model_id)

    def export(self, folder: str | Path, format: Literal["peft", "merged"] = "peft", **options: Any) -> Path:
        """Write the adapter as it is after the calls made so far to `folder`, as PEFT, transformers and vLLM
        load it; or `merged` into its base model, which needs transformers and peft here. See
        `tinsmith.export`."""
        from tinsmith.export import export

        return export(self, Path(folder), format, **options)

    def get_info(self) -> GetInfoResponse:
        return self._info

    async def get_info_async(self) -> GetInfoResponse:
        return self._info

    def get_tokenizer(self) -> "Tokenizer":
        """The base model's tokenizer, from the service."""
        from tinsmith.tokenizer import fetch_tokenizer

        data = self._info.model_data
        found: Tokenizer = fetch_tokenizer(self._connection, data.model_name or "", data.tokenizer_id)
        return found

    def get_console_url(self) -> str:
        """Where the service tells of this run, with a key."""
        return f"{self._connection.base_url}/api/v1/training_runs/{self.model_id}"

    forward_async = submitted(forward)
    forward_backward_async = submitted(forward_backward)
    forward_backward_custom_async = submitted(forward_backward_custom)
    optim_step_async = submitted(optim_step)
    save_state_async = submitted(save_state)
    load_state_async = submitted(load_state)
    load_state_with_optimizer_async = submitted(load_state_with_optimizer)
    save_weights_for_sampler_async = submitted(save_weights_for_sampler)
    save_weights_external_async = submitted(save_weights_external)
    save_weights_and_get_sampling_client_async = awaited(save_weights_and_get_sampling_client)
    create_sampling_client_async = awaited(create_sampling_client)

    @contextmanager
    def _numbered(self, request: pb.ForwardBackwardRequest) -> Iterator[bytes]:
        """The body of the run's next call, to be sent inside. Where it is not, because Ctrl-C ended the wait
        for a service that was away, its number is used up."""
        seq_id = next(self._seq_ids)
        try:
            yield self._body(request, seq_id)
        except BaseException:
            self._skip([seq_id])
            raise

    @contextmanager
    def _named(self, fields: Mapping[str, Any]) -> Iterator[bytes]:
        """As `_numbered`, of a call that is JSON."""
        seq_id = next(self._seq_ids)
        named = {"model_id": self.model_id, "seq_id": seq_id, **given(fields)}
        try:
            try:
                body = json.dumps(named, allow_nan=False).encode()
            except (TypeError, ValueError) as error:  # NaN, or what JSON has no form for
                raise InvalidInput(f"{given(fields)} cannot be sent: {error}") from None
            yield body
        except BaseException:
            self._skip([seq_id])
            raise

    def _pack(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        forward_only: bool = False,
    ) -> list[pb.ForwardBackwardRequest]:
        config = self._connection.config
        return pack(
            data,
            loss_fn,
            loss_fn_config,
            forward_only=forward_only,
            max_datums=config.get("fwdbwd_max_chunk_len", MAX_DATUMS),
            max_bytes=config.get("fwdbwd_max_chunk_bytes_count", MAX_BYTES),
        )

    def _body(self, request: pb.ForwardBackwardRequest, seq_id: int) -> bytes:
        request.model_id, request.seq_id = self.model_id, seq_id
        return request.SerializeToString()

    def _send_pass(self, request: pb.ForwardBackwardRequest, seq_id: int, aside: bool | None = None) -> Sent:
        body = self._body(request, seq_id)
        return self._connection.send(
            "POST", "forward_backward", content=body, headers=_PROTOBUF_BODY, aside=aside
        )

    def _output(self, sent: Sequence[Sent]) -> Future[ForwardBackwardOutput]:
        def fetch(until: float | None) -> ForwardBackwardOutput:
            return merge([unpack(self._connection.result(one, PROTOBUF, until).content) for one in sent])

        return Future(fetch, self._connection.waiters)

    def _promise(self, sent: Sent, read: Callable[[dict[str, Any]], Made]) -> Future[Made]:
        return Future(
            lambda until: read(read_json(self._connection.result(sent, until=until))),
            self._connection.waiters,
        )

    def _skip(self, seq_ids: Iterable[int]) -> None:
        """Use numbers up that were taken: the service waits for every one. A forward pass changes nothing;
        one whose number did arrive, with its call, is refused. Nobody waits for either."""
        nothing = Datum(ModelInput.from_ints([0]), {"target_tokens": [0], "weights": [0.0]})
        for seq_id in seq_ids:
            (request,) = pack([nothing], "cross_entropy", forward_only=True)
            self._send_pass(request, seq_id, aside=True)


class TrainingClientFuture(ClientFuture[TrainingClient], TrainingClient):
    """The promise of a TrainingClient, which may be used as the client itself."""


def _info(answer: Mapping[str, Any]) -> GetInfoResponse:
    known = {name: answer["model_data"].get(name) for name in ("arch", "model_name", "tokenizer_id")}
    return GetInfoResponse(
        answer["model_id"],
        ModelData(**known),
        lora_rank=answer.get("lora_rank"),
        is_lora=answer.get("is_lora"),
        model_name=answer.get("model_name"),
        tuning_config=answer.get("tuning_config"),
    )
