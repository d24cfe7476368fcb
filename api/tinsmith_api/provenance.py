"""stable_reinforce asks the server what it sampled: q comes from the server's own record, not the caller.

A datum's `loss_fn_input_spans` tile its target tokens and name the sampled sequences they came from. Where
a span was sampled, `logprobs` becomes the record's and `sampled_mask` 1; elsewhere both are 0.
"""

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums, samples
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.losses import REINFORCE_MASK
from tinsmith_api.journal.tables import sampled_sequences
from tinsmith_api.owner import Owner

LOSS = "stable_reinforce"

# Databases take tens of thousands of parameters per statement at most.
_IDS_PER_QUERY = 1000

# sequence id -> (tokens, their logprobs)
Records = dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]


async def fill(mine: Owner, message: pb.ForwardBackwardRequest) -> None:
    """Put `logprobs` and `sampled_mask` into every datum; InvalidInput if its spans do not say enough."""
    wanted = {
        span.sampled_tokens.sequence_id
        for datum in message.data
        for span in datum.loss_fn_input_spans
        if span.WhichOneof("span") == "sampled_tokens"
    }
    records = await mine.service.read_apart(lambda c: _records(c, sorted(wanted), mine.tenant_id))
    for index, datum in enumerate(message.data):
        try:
            _fill_datum(datum, records)
        except InvalidInput as error:
            raise InvalidInput(f"datum {index}: {error}") from None


def _records(connection: sa.Connection, sequence_ids: list[str], tenant_id: str) -> Records:
    records: Records = {}
    for start in range(0, len(sequence_ids), _IDS_PER_QUERY):
        statement = sa.select(sampled_sequences).where(
            sampled_sequences.c.id.in_(sequence_ids[start : start + _IDS_PER_QUERY]),
            sampled_sequences.c.tenant_id == tenant_id,
        )
        for row in connection.execute(statement):
            records[row.id] = (np.frombuffer(row.tokens, "<i4"), np.frombuffer(row.logprobs, "<f4"))
    return records


def _fill_datum(datum: pb.Datum, records: Records) -> None:
    if "target_tokens" not in datum.loss_fn_inputs:
        raise InvalidInput("loss_fn_inputs lacks `target_tokens`")
    if len(datums.shape_of(datum.loss_fn_inputs["target_tokens"])) != 1:
        raise InvalidInput(f"{LOSS} takes one target per token, `target_tokens` is 2-D")
    targets = datums.array(datum.loss_fn_inputs["target_tokens"])
    logprobs, mask = np.zeros(len(targets), np.float32), np.zeros(len(targets), np.float32)
    row = 0
    for span in datum.loss_fn_input_spans:
        sampled = span.WhichOneof("span") == "sampled_tokens"
        given = span.sampled_tokens if sampled else span.prompt_tokens
        stop = row + given.length
        if given.length < 0 or given.offset < 0 or stop > len(targets):
            raise InvalidInput(f"loss_fn_input_spans cover more than its {len(targets)} targets")
        if sampled:
            if given.sequence_id not in records:
                raise InvalidInput(
                    f"no record of sequence {given.sequence_id!r}: sample with record_stability_info, "
                    "and train within a day"
                )
            tokens, recorded = records[given.sequence_id]
            part = slice(given.offset, given.offset + given.length)
            if len(tokens[part]) != given.length or (tokens[part] != targets[row:stop]).any():
                raise InvalidInput(
                    f"targets {row}..{stop - 1} are not what sequence {given.sequence_id!r} sampled there"
                )
            logprobs[row:stop], mask[row:stop] = recorded[part], 1
        row = stop
    if row != len(targets):
        raise InvalidInput(
            f"loss_fn_input_spans cover {row} of its {len(targets)} targets; stable_reinforce needs all"
        )
    datum.loss_fn_inputs["logprobs"].CopyFrom(samples.dense(logprobs))
    datum.loss_fn_inputs[REINFORCE_MASK].CopyFrom(samples.dense(mask))
