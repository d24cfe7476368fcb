"""What is asked of a sampler: from the JSON of a request to the SampleTask of a worker."""

import secrets
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from tinsmith.errors import InvalidInput
from tinsmith.wire import json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.datums import array, shape_of
from tinsmith_api.bodies import Body, Strict

_MAX_SAMPLES = 1024
_MAX_TOPK = 128
_MAX_STOPS = 256
_MAX_STOP_BYTES = 1024
_MAX_RESULT_BYTES = 64 << 20
_INT32 = 2**31 - 1


class Limits(Protocol):
    """Of a base model."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_context_length(self) -> int: ...


class SamplingParams(Strict):
    max_tokens: int | None = Field(None, ge=0, le=_INT32)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = Field(-1, ge=-1, le=_INT32)
    top_p: float = Field(1.0, gt=0, le=1)


class Prompt(Body):
    chunks: list[Any]


class Sample(Body):
    sampling_session_id: str | None = None
    base_model: str | None = None
    model_path: str | None = None
    seq_id: int = Field(ge=0, le=2**63 - 1)
    prompt: Prompt
    num_samples: int = Field(1, ge=1, le=_MAX_SAMPLES)
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = False
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: Annotated[int, Field(ge=0, le=_MAX_TOPK)] = 0
    prompt_logprobs_last_n: int | None = Field(None, ge=0, le=_INT32)
    record_stability_info: bool = False


def task_of(body: Sample, limits: Limits) -> pb.SampleTask:
    prompt = json_form.read_tokens(body.prompt.chunks)
    _check_prompt(prompt, limits)
    params = body.sampling_params
    room = limits.max_context_length - len(prompt)
    task = pb.SampleTask(
        prompt=prompt.astype("<i4").tobytes(),
        num_samples=body.num_samples,
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        # Fixed here, so that a sample that is computed again after a crash is the same one.
        seed=secrets.randbits(63) if params.seed is None else params.seed % 2**64,  # -1 is one, too
        temperature=params.temperature,
        top_k=params.top_k or -1,
        top_p=params.top_p,
        default_stop=params.stop is None,
        prompt_logprobs=bool(body.prompt_logprobs),
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
        record_stability_info=body.record_stability_info,
    )
    stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
    if len(stops) > _MAX_STOPS:
        raise InvalidInput(
            f"sampling_params.stop holds {len(stops)} entries, the limit is {_MAX_STOPS}: each token is "
            "compared with all of them"
        )
    for stop in stops:
        if isinstance(stop, str):
            if not stop:
                raise InvalidInput("sampling_params.stop holds an empty string")
            if len(stop.encode()) > _MAX_STOP_BYTES:
                raise InvalidInput(
                    f"sampling_params.stop holds a text of {len(stop.encode())} bytes, the limit is "
                    f"{_MAX_STOP_BYTES}: so much of a sequence is read again after each token"
                )
            task.stop_strings.append(stop)
        elif not 0 <= stop < limits.vocab_size:
            raise InvalidInput(f"sampling_params.stop holds {stop}, outside the vocabulary")
        else:
            task.stop_tokens.append(stop)
    if body.target_prompt_logprobs is not None:
        task.target_prompt_logprobs.CopyFrom(_targets(body.target_prompt_logprobs, len(prompt)))
    _check_result_size(task, len(prompt))
    # After the size: these are made dense here.
    if task.HasField("target_prompt_logprobs"):
        _check_targets(array(task.target_prompt_logprobs), limits)
    return task


def _check_result_size(task: pb.SampleTask, prompt_tokens: int) -> None:
    """A token and its logprob are 8 bytes each, wherever they are asked for."""
    sampled = task.num_samples * task.max_tokens * 8 * (1 + task.topk_sample_logprobs)
    if sampled > _MAX_RESULT_BYTES:
        raise InvalidInput(
            f"{task.num_samples} samples of up to {task.max_tokens} tokens with topk_sample_logprobs "
            f"{task.topk_sample_logprobs} can be {sampled} bytes, the limit is {_MAX_RESULT_BYTES}: "
            "set a smaller max_tokens, or ask for fewer at a time"
        )
    targets = task.target_prompt_logprobs.shape[1] if task.HasField("target_prompt_logprobs") else 0
    per_token = 1 + task.topk_prompt_logprobs + task.prompt_alt_tokens_k + targets
    if prompt_tokens * 8 * per_token > _MAX_RESULT_BYTES - sampled:
        raise InvalidInput(
            f"{per_token} logprobs for each of {prompt_tokens} prompt tokens make a result of more than "
            f"{_MAX_RESULT_BYTES} bytes: ask for fewer, or for a shorter prompt"
        )


def _check_prompt(prompt: "np.ndarray[Any, np.dtype[np.int32]]", limits: Limits) -> None:
    if not len(prompt):
        raise InvalidInput("the prompt is empty: give at least one token")
    if len(prompt) >= limits.max_context_length:
        raise InvalidInput(
            f"the prompt has {len(prompt)} tokens, the model takes {limits.max_context_length} "
            "with the answer: shorten it"
        )
    bad = (prompt < 0) | (prompt >= limits.vocab_size)
    if bad.any():
        raise InvalidInput(
            f"the prompt holds token {prompt[bad][0]}, outside the vocabulary 0..{limits.vocab_size - 1}"
        )


def _targets(given: dict[str, Any], prompt_tokens: int) -> pb.Tensor:
    tensor = json_form.read_tensor({"dtype": "int64", **given}, "target_prompt_logprobs")
    shape = shape_of(tensor)
    if tensor.dtype != pb.DTYPE_INT64 or len(shape) != 2 or shape[0] != prompt_tokens - 1:
        raise InvalidInput(f"target_prompt_logprobs must be int64 of shape [{prompt_tokens - 1}, K]")
    return tensor


def _check_targets(targets: "np.ndarray[Any, np.dtype[Any]]", limits: Limits) -> None:
    if ((targets < -1) | (targets >= limits.vocab_size)).any():
        raise InvalidInput(
            "target_prompt_logprobs holds tokens outside the vocabulary; -1 marks an empty cell"
        )
