"""Results in the form the journal keeps, and the rows that are written with them."""

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith.wire import samples
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.journal import audit, checkpoints, usage
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.tables import sampled_sequences
from tinsmith_worker.contract import Failure, SampledPiece, SampledSequence, SampleOutput
from tinsmith_worker.targets import answered

Json = dict[str, Any]


def json_body(value: Json) -> bytes:
    return json.dumps(value).encode()


def deadly(deaths: int) -> Failure:
    """What a call is told that was tried alone, more than once, and each time the worker ended."""
    return Failure(
        f"given up: {deaths} worker processes ended one after the other, the last ones while they executed "
        "this call alone. It may need more memory than there is: ask for less at once",
        "server",
    )


def optim_step(metrics: dict[str, float]) -> bytes:
    # JSON has no NaN or infinity: a number that is not finite is left out.
    return json_body({"metrics": {name: value for name, value in metrics.items() if np.isfinite(value)}})


def metrics(kind: str, body: bytes) -> Json | None:
    """What is kept of a result for the run's curve."""
    if kind in (ops.FORWARD, ops.FORWARD_BACKWARD):
        given = dict(pb.ForwardBackwardOutput.FromString(body).metrics)
    elif kind == ops.OPTIM_STEP:
        given = json.loads(body)["metrics"]
    else:
        return None
    return {name: value for name, value in given.items() if np.isfinite(value)}


def saved(given: Json, size_bytes: int) -> Json:
    if given.get("sampling_session_id"):
        return {"sampling_session_id": given["sampling_session_id"]}
    if given["kind"] == "external_weights":
        return {"path": given["path"], "size_bytes": size_bytes}
    return {"path": given["path"]}


def checkpoint_row(operation: Operation, given: Json, lora: Json, size_bytes: int) -> Json:
    ttl = given.get("ttl_seconds")
    return {
        "path": given["path"],
        "run_id": operation.subject,
        "tenant_id": operation.tenant_id,
        "kind": given["kind"],
        "name": given["name"],
        "listed": not given.get("sampling_session_id"),
        "object_prefix": given["object_prefix"],
        "lora": lora,
        "user_metadata": given.get("user_metadata") or {},
        "size_bytes": size_bytes,
        "expires_at": None if ttl is None else time.time() + ttl,
    }


def publish(connection: sa.Connection, operation: Operation, given: Json, row: Json) -> None:
    """Make a save visible, and the sampler of an unnamed one; InvalidInput if its number is taken."""
    checkpoints.publish(connection, operation.request_id, row)
    if row["listed"]:
        details = {"tinker_path": row["path"], "size_bytes": row["size_bytes"]}
        audit.record_by_key(
            connection, operation.tenant_id, "checkpoints", "checkpoint_saved", details, operation.key_id
        )
    if not (sampler_id := given.get("sampling_session_id")):
        return
    sampler = {
        "id": sampler_id,
        "tenant_id": operation.tenant_id,
        "session_id": given["session_id"],
        "base_model": operation.base_model,
        "model_path": given["path"],
        # One that follows its run has what lies at the path whenever it is asked.
        "object_prefix": None if given.get("follows") else given["object_prefix"],
    }
    if not checkpoints.open_sampler(connection, sampler):
        raise InvalidInput(f"sampling session {sampler_id} exists with other weights: use the next number")


def free_name(connection: sa.Connection, operation: Operation) -> None:
    if operation.kind in ops.SAVES:
        written = checkpoints.prefix_of(operation.tenant_id, operation.subject, operation.request_id)
        checkpoints.free_name(connection, operation.request_id, written)


def give_up(connection: sa.Connection, run_id: str, seq_ids: Sequence[int], **lease: Any) -> list[str]:
    """As `ops.give_up`; the names that late saves had taken are free again. Returns request ids."""
    late = ops.give_up(connection, run_id, seq_ids, **lease)
    for operation in late:
        free_name(connection, operation)
    return [operation.request_id for operation in late]


def sampled(output: SampleOutput, task: pb.SampleTask) -> bytes:
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.cache_hit_tokens)
    for sequence in output.sequences:
        message.sequences.append(_sequence(sequence))
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = _float32(output.prompt_logprobs)
    if output.topk_prompt is not None:
        message.topk_prompt_logprobs.CopyFrom(
            samples.topk(output.topk_prompt.token_ids, output.topk_prompt.logprobs)
        )
    if output.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(
            answered(task.target_prompt_logprobs, output.target_prompt_logprobs)
        )
    if output.prompt_alt_tokens is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(samples.dense(output.prompt_alt_tokens.token_ids))
        message.prompt_alt_tokens.logprobs.CopyFrom(samples.dense(output.prompt_alt_tokens.logprobs))
    return message.SerializeToString()


def piece(given: SampledPiece) -> pb.SampledPiece:
    return pb.SampledPiece(
        index=given.index, start=given.start, sequence=_sequence(given.sequence), ends=given.ends
    )


def used(output: SampleOutput, task: pb.SampleTask) -> dict[str, int]:
    """The tokens that were read and sampled. What was in the cache is counted apart."""
    prompt = len(task.prompt) // 4
    return {
        usage.PREFILL: prompt - output.cache_hit_tokens,
        usage.PREFILL_CACHED: output.cache_hit_tokens,
        usage.SAMPLED: sum(len(sequence.tokens) for sequence in output.sequences),
    }


def record_sequences(
    connection: sa.Connection, operation: Operation, task: pb.SampleTask, output: SampleOutput
) -> None:
    """Keep what was sampled, for a loss that asks the server what it drew (record_stability_info)."""
    if not task.record_stability_info:
        return
    for sequence_id, sequence in zip(task.sequence_ids, output.sequences, strict=True):
        connection.execute(
            sa.insert(sampled_sequences).values(
                id=sequence_id,
                tenant_id=operation.tenant_id,
                tokens=sequence.tokens.astype("<i4").tobytes(),
                logprobs=_float32(sequence.logprobs),
                created_at=time.time(),
            )
        )


def _sequence(sequence: SampledSequence) -> pb.SampledSequence:
    message = pb.SampledSequence(
        stop_reason=pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH,
        tokens=sequence.tokens.astype("<i4").tobytes(),
        logprobs=_float32(sequence.logprobs),
    )
    if sequence.topk is not None:
        message.topk_sampled_logprobs.CopyFrom(samples.topk(sequence.topk.token_ids, sequence.topk.logprobs))
    return message


def _float32(values: npt.NDArray[np.float32]) -> bytes:
    return values.astype("<f4").tobytes()
