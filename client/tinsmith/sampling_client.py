"""A sampler: one frozen set of weights, sampled from."""

import base64
import itertools
import json
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tinsmith.connection import PROTOBUF, Connection, Sent, given, read_json
from tinsmith.errors import NotFound
from tinsmith.future import ClientFuture, Future, awaited
from tinsmith.messages import json_prompt, json_tensor, unpack_sample
from tinsmith.session import Session
from tinsmith.types import ModelInput, SampleResponse, SamplingParams, TensorData

if TYPE_CHECKING:
    from tinsmith.tokenizer import Tokenizer

# Copies of one sampler number their calls in blocks of so many.
_BLOCK = 1_000_000_000


class SamplingClient:
    """Samples and scores. Calls run side by side, in no order.

    May be pickled, key included, or handed on by `get_sampler_handle`, without it: the copy samples the same
    weights under numbers of its own.
    """

    def __init__(
        self,
        connection: Connection,
        sampling_session_id: str,
        base_model: str | None = None,
        record_stability_info: bool = False,
        *,
        copy: int = 0,
    ) -> None:
        self.sampling_session_id = sampling_session_id
        self._connection = connection
        self._base_model = base_model
        self._record_stability_info = record_stability_info
        self._seq_ids = itertools.count(copy * _BLOCK)

    @classmethod
    def open(
        cls,
        session: Session,
        model_path: str | None,
        base_model: str | None,
        record_stability_info: bool,
    ) -> "SamplingClientFuture":
        """A sampler of `session`; asked for at once."""
        number, connection = next(session.samplers), session.connection

        def ask() -> str:
            fields = {
                "session_id": session.id,
                "sampling_session_seq_id": number,
                "model_path": model_path,
                "base_model": base_model,
            }
            answer = connection.post("create_sampling_session", fields, fatal=(402,))
            return str(answer["sampling_session_id"])

        asked = connection.promised(ask)
        return SamplingClientFuture(
            lambda until: cls(connection, asked(until), base_model, record_stability_info), connection.waiters
        )

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
        fields = {
            "sampling_session_id": self.sampling_session_id,
            "prompt": json_prompt(prompt),
            "num_samples": num_samples,
            "sampling_params": given(asdict(sampling_params)),
            "prompt_logprobs": include_prompt_logprobs,
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "target_prompt_logprobs": target_prompt_logprobs and json_tensor(target_prompt_logprobs),
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
            "prompt_logprobs_last_n": prompt_logprobs_last_n,
            "record_stability_info": self._record_stability_info,
        }
        sent = [self._send(fields)]

        def fetch(until: float | None) -> SampleResponse:
            try:
                return self._read(sent[-1], until)
            except NotFound as error:
                if error.status_code != 410:
                    raise
            # The service dropped the promise. Nothing depends on it: the same again, as another call.
            sent.append(self._send(fields))
            return self._read(sent[-1], until)

        future = Future(fetch, self._connection.sample_waiters)
        future.future()  # fetched when it is there, not one after the other when somebody asks
        return future

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
        return scored.then(lambda response: response.prompt_logprobs or [])

    sample_async = awaited(sample)
    compute_logprobs_async = awaited(compute_logprobs)

    def get_base_model(self) -> str:
        if self._base_model is None:
            self._base_model = str(self._connection.get(f"samplers/{self.sampling_session_id}")["base_model"])
        return self._base_model

    async def get_base_model_async(self) -> str:
        return await Future(lambda _: self.get_base_model(), self._connection.waiters)

    def get_tokenizer(self) -> "Tokenizer":
        """The base model's tokenizer, from the service."""
        from tinsmith.tokenizer import fetch_tokenizer

        found: Tokenizer = fetch_tokenizer(self._connection, self.get_base_model())
        return found

    def get_sampler_handle(self) -> str:
        """A text that `from_sampler_handle` makes a client of, in any process. It holds no key."""
        return base64.urlsafe_b64encode(json.dumps(self._state()).encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> "SamplingClient":
        """A client of the sampler behind `handle`, with this process's key unless another is given."""
        return _copy(json.loads(base64.urlsafe_b64decode(handle)), api_key)

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any], str | None]]:
        return _copy, (self._state(), self._connection.key.secret)

    def _state(self) -> dict[str, Any]:
        return {
            "base_url": self._connection.base_url,
            "sampling_session_id": self.sampling_session_id,
            "base_model": self._base_model,
            "record_stability_info": self._record_stability_info,
        }

    def _send(self, fields: dict[str, Any]) -> Sent:
        # Aside, because a hundred samples at once are the rule, and each would wait for the answer to the
        # one before.
        numbered = {**given(fields), "seq_id": next(self._seq_ids)}
        return self._connection.send("POST", "asample", json=numbered, aside=True)

    def _read(self, sent: Sent, until: float | None) -> SampleResponse:
        body = self._connection.result(sent, PROTOBUF, until).content
        return unpack_sample(body, read_json(sent.result())["sample_sequence_ids"])


class SamplingClientFuture(ClientFuture[SamplingClient], SamplingClient):
    """The promise of a SamplingClient, which may be used as the client itself."""


def _copy(state: dict[str, Any], api_key: str | None) -> SamplingClient:
    state = dict(state)
    connection = Connection(state.pop("base_url"), api_key)
    return SamplingClient(connection, **state, copy=secrets.randbelow(_BLOCK - 1) + 1)
