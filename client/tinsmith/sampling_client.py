"""A sampler: one frozen set of weights, sampled from."""

import itertools
from dataclasses import asdict
from typing import Any

from tinsmith.connection import Connection
from tinsmith.future import Future
from tinsmith.messages import unpack_sample
from tinsmith.types import ModelInput, SampleResponse, SamplingParams, TensorData


class SamplingClient:
    """Samples and scores. Calls run side by side, in no order."""

    def __init__(
        self, connection: Connection, sampling_session_id: str, record_stability_info: bool = False
    ) -> None:
        self.sampling_session_id = sampling_session_id
        self._connection = connection
        self._record_stability_info = record_stability_info
        self._seq_ids = itertools.count()

    @classmethod
    async def create(
        cls,
        connection: Connection,
        number: int,
        model_path: str | None,
        base_model: str | None,
        record_stability_info: bool,
    ) -> "SamplingClient":
        fields = {
            "session_id": await connection.session_id(),
            "sampling_session_seq_id": number,
            "model_path": model_path,
            "base_model": base_model,
        }
        answer = await connection.submit("create_sampling_session", fields)
        return cls(connection, answer["sampling_session_id"], record_stability_info)

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> Future[SampleResponse]:
        """`num_samples` continuations of `prompt`, N tokens long.

        A sampled token's logprob is that of the distribution it was drawn from; prompt logprobs are
        the plain model's. `target_prompt_logprobs` [N - 1, K] names tokens to score: row i scores
        candidates for prompt token i + 1, and -1 leaves a cell out.
        """
        params = {name: value for name, value in asdict(sampling_params).items() if value is not None}
        targets = target_prompt_logprobs
        fields = {
            "sampling_session_id": self.sampling_session_id,
            "seq_id": next(self._seq_ids),
            "prompt": {"chunks": [{"type": c.type, "tokens": c.tokens.tolist()} for c in prompt.chunks]},
            "num_samples": num_samples,
            "sampling_params": params,
            "prompt_logprobs": include_prompt_logprobs,
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "target_prompt_logprobs": targets
            and {"data": targets.data, "dtype": targets.dtype, "shape": targets.shape},
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
            "prompt_logprobs_last_n": prompt_logprobs_last_n,
            "record_stability_info": self._record_stability_info,
        }
        return self._connection.start(self._sample(fields))

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> Future[list[float | None]]:
        """The plain model's logprob of every prompt token given those before it; None for the first."""
        scored = self.sample(
            prompt,
            num_samples=1,
            sampling_params=SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )

        async def logprobs() -> list[float | None]:
            return (await scored).prompt_logprobs or []

        return self._connection.start(logprobs())

    async def _sample(self, fields: dict[str, Any]) -> SampleResponse:
        promise = await self._connection.submit("asample", fields)
        async with self._connection.sample_polls:
            body = await self._connection.result_protobuf(promise["request_id"])
        return unpack_sample(body, promise["sample_sequence_ids"])
