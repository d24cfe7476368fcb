"""target_prompt_logprobs between the wire and the sampler: what a sparse one leaves out is not asked.

Shapes: P tokens of the prompt, K columns.
"""

import numpy as np

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums, samples
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.batch import Float32, Int64

NOT_ASKED = -1


def asked(tensor: pb.Tensor) -> Int64:
    """[P - 1, K] token ids, NOT_ASKED in every cell that a sparse tensor does not list."""
    if tensor.WhichOneof("encoding") != "sparse_csr":
        return datums.array(tensor).astype(np.int64)
    if tensor.dtype != pb.DTYPE_INT64:
        raise InvalidInput("target_prompt_logprobs must be int64")
    # A cell left out becomes 0 when it is made dense, which is a token: all others are moved up meanwhile.
    moved = pb.Tensor()
    moved.CopyFrom(tensor)
    values = np.frombuffer(tensor.sparse_csr.values, "<i8") - NOT_ASKED
    moved.sparse_csr.values = values.astype("<i8").tobytes()
    return datums.array(moved).astype(np.int64) + NOT_ASKED


def answered(tensor: pb.Tensor, logprobs: Float32) -> pb.Tensor:
    """The logprobs [P - 1, K] of what `tensor` asked, in its layout: dense, or its very cells."""
    if tensor.WhichOneof("encoding") != "sparse_csr":
        return samples.dense(logprobs)
    answer = pb.Tensor()
    answer.CopyFrom(tensor)
    answer.dtype = pb.DTYPE_FLOAT32
    counts = np.diff(np.frombuffer(tensor.sparse_csr.crow_indices, "<i8"))
    rows = np.repeat(np.arange(len(counts)), counts)
    columns = np.frombuffer(tensor.sparse_csr.col_indices, "<i8")
    answer.sparse_csr.values = logprobs[rows, columns].astype("<f4").tobytes()
    return answer
