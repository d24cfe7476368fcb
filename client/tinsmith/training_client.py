"""A run: one adapter being trained, through the primitive calls."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeVar

import numpy as np

from tinsmith.connection import Connection
from tinsmith.errors import InvalidInput
from tinsmith.future import Future
from tinsmith.messages import merge, pack, unpack
from tinsmith.sampling_client import SamplingClient
from tinsmith.types import (
    AdamParams,
    Array,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    LossFn,
    ModelData,
    OptimStepResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
)
from tinsmith.wire import tinsmith_pb2 as pb

Made = TypeVar("Made")
CustomLoss = Callable[[Sequence[Datum], list[Any]], tuple[Any, ...]]
Differentiated = tuple[float, list[Array], dict[str, float]]


class TrainingClient:
    """Submits calls in the order they are made and returns futures at once, so that an optim_step can be
    on its way while its forward_backward still runs:

        forward_backward = training.forward_backward(data, "cross_entropy")
        optim_step = training.optim_step(AdamParams(learning_rate=1e-4))
        print(forward_backward.result().metrics["loss:sum"], optim_step.result().metrics)
    """

    def __init__(self, connection: Connection, info: GetInfoResponse, samplers: Iterator[int]) -> None:
        self.model_id = info.model_id
        self._info = info
        self._connection = connection
        self._samplers = samplers
        self._seq_ids = itertools.count(1)
        # Held while a call is submitted: numbers reach the service in the order of the calls.
        self._turn = asyncio.Lock()

    @classmethod
    async def create(cls, connection: Connection, model_id: str, samplers: Iterator[int]) -> "TrainingClient":
        answer = await connection.submit("get_info", {"model_id": model_id})
        known = {name: answer["model_data"].get(name) for name in ("arch", "model_name", "tokenizer_id")}
        info = GetInfoResponse(answer["model_id"], ModelData(**known), answer.get("lora_rank"))
        return cls(connection, info, samplers)

    def forward(
        self, data: Sequence[Datum], loss_fn: LossFn, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Losses and logprobs; the accumulated gradient stays as it is."""
        return self._connection.start(self._pass(pack(data, loss_fn, loss_fn_config, forward_only=True)))

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: LossFn, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Losses and logprobs; adds the gradient of the summed loss to the accumulated one."""
        return self._connection.start(self._pass(pack(data, loss_fn, loss_fn_config)))

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, arrays: Literal["torch", "numpy"] = "torch"
    ) -> Future[ForwardBackwardOutput]:
        """A loss of your own over the targets' logprobs, computed here; two passes on the service.

        arrays="torch": loss_fn(data, logprobs) gets one tensor per datum that requires grad, and returns
        (loss, metrics). arrays="numpy": it gets float32 arrays and returns (loss, gradients, metrics),
        gradients[i] being dloss/dlogprobs[i]. Calls made later are submitted after it.
        """
        zeros = [_cross_entropy(datum, datum.loss_fn_inputs.get("weights")) for datum in data]
        forward = pack(zeros, "cross_entropy", forward_only=True)
        differentiate = _differentiate_torch if arrays == "torch" else _differentiate_numpy
        return self._connection.start(self._custom_pass(data, forward, loss_fn, differentiate))

    def optim_step(self, adam_params: AdamParams | None = None) -> Future[OptimStepResponse]:
        """One AdamW step with the accumulated gradient, which it clears."""
        fields = {"adam_params": asdict(adam_params or AdamParams())}
        return self._operate("optim_step", fields, lambda answer: OptimStepResponse(answer.get("metrics")))

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
        return self._operate("save_weights", fields, lambda answer: SaveWeightsResponse(answer["path"]))

    def load_state(self, path: str) -> Future[LoadWeightsResponse]:
        """Take over a checkpoint's weights; the optimizer starts anew."""
        return self._load(path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> Future[LoadWeightsResponse]:
        """Go on exactly where the checkpoint left off."""
        return self._load(path, optimizer=True)

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
        return self._operate(
            "save_weights_for_sampler", fields, lambda answer: SaveWeightsForSamplerResponse(answer["path"])
        )

    def save_weights_and_get_sampling_client(
        self, *, record_stability_info: bool = False
    ) -> Future[SamplingClient]:
        """A sampler of the weights as they are after the calls made so far; training on leaves it alone."""
        fields = {"kind": "snapshot", "sampling_session_seq_id": next(self._samplers)}
        return self._operate(
            "save_weights_for_sampler",
            fields,
            lambda answer: SamplingClient(
                self._connection, answer["sampling_session_id"], record_stability_info
            ),
        )

    def create_sampling_client(
        self, model_path: str, *, record_stability_info: bool = False
    ) -> Future[SamplingClient]:
        """As ServiceClient.create_sampling_client."""
        return self._connection.start(
            SamplingClient.create(
                self._connection, next(self._samplers), model_path, None, record_stability_info
            )
        )

    def get_info(self) -> GetInfoResponse:
        return self._info

    def _load(self, path: str, *, optimizer: bool) -> Future[LoadWeightsResponse]:
        fields = {"path": path, "optimizer": optimizer}
        return self._operate("load_weights", fields, lambda answer: LoadWeightsResponse(answer.get("path")))

    def _operate(
        self, path: str, fields: Mapping[str, Any], read: Callable[[dict[str, Any]], Made]
    ) -> Future[Made]:
        async def operate() -> Made:
            async with self._turn:
                numbered = {"model_id": self.model_id, "seq_id": next(self._seq_ids), **fields}
                promise = await self._connection.submit(path, numbered)
            return read(await self._connection.result(promise["request_id"]))

        return self._connection.start(operate())

    async def _pass(self, requests: list[pb.ForwardBackwardRequest]) -> ForwardBackwardOutput:
        async with self._turn:
            request_ids = [await self._submit(request) for request in requests]
        return await self._output(request_ids)

    async def _custom_pass(
        self,
        data: Sequence[Datum],
        forward: list[pb.ForwardBackwardRequest],
        loss_fn: CustomLoss,
        differentiate: Callable[[CustomLoss, Sequence[Datum], list[Array]], Differentiated],
    ) -> ForwardBackwardOutput:
        async with self._turn:
            seen = await self._output([await self._submit(request) for request in forward])
            logprobs = [output["logprobs"].to_numpy() for output in seen.loss_fn_outputs]
            loss, gradients, metrics = await asyncio.to_thread(differentiate, loss_fn, data, logprobs)
            # The cross entropy of weights -dC/dlogprob has the gradient of C.
            surrogate = [
                _cross_entropy(datum, -np.asarray(gradient, np.float32))
                for datum, gradient in zip(data, gradients, strict=True)
            ]
            backward = pack(surrogate, "cross_entropy")
            request_ids = [await self._submit(request) for request in backward]
        output = await self._output(request_ids)
        output.metrics["surrogate_loss:sum"] = output.metrics.pop("loss:sum")
        output.metrics.update({"loss:sum": loss, **metrics})
        return output

    async def _submit(self, request: pb.ForwardBackwardRequest) -> str:
        request.model_id, request.seq_id = self.model_id, next(self._seq_ids)
        promise = await self._connection.submit_protobuf("forward_backward", request.SerializeToString())
        return str(promise["request_id"])

    async def _output(self, request_ids: Sequence[str]) -> ForwardBackwardOutput:
        bodies = await asyncio.gather(*map(self._connection.result_protobuf, request_ids))
        return merge([unpack(body) for body in bodies])


def _cross_entropy(datum: Datum, weights: Any) -> Datum:
    targets = datum.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise InvalidInput("a custom loss needs `target_tokens` in every datum's loss_fn_inputs")
    if weights is None:
        weights = np.zeros(targets.shape, np.float32)
    return Datum(datum.model_input, {"target_tokens": targets, "weights": weights})


def _differentiate_torch(loss_fn: CustomLoss, data: Sequence[Datum], logprobs: list[Array]) -> Differentiated:
    import torch

    leaves = [torch.from_numpy(values.copy()).requires_grad_() for values in logprobs]
    loss, metrics = loss_fn(data, leaves)
    loss.backward()
    zero = [np.zeros_like(values) for values in logprobs]
    gradients = [z if leaf.grad is None else leaf.grad.numpy() for z, leaf in zip(zero, leaves, strict=True)]
    return float(loss.detach()), gradients, metrics


def _differentiate_numpy(loss_fn: CustomLoss, data: Sequence[Datum], logprobs: list[Array]) -> Differentiated:
    loss, gradients, metrics = loss_fn(data, logprobs)
    return float(loss), gradients, metrics
