"""Results of sampling in wire form, and dense tensors."""

import numpy as np
import numpy.typing as npt

from tinsmith.wire import tinsmith_pb2 as pb

_DTYPE = {"float32": pb.DTYPE_FLOAT32, "int64": pb.DTYPE_INT64, "int32": pb.DTYPE_INT32}


def dense(values: npt.NDArray[np.generic]) -> pb.Tensor:
    """float32, int64 or int32 values of any shape."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return pb.Tensor(dense=little.tobytes(), dtype=_DTYPE[values.dtype.name], shape=values.shape)


def topk(token_ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]) -> pb.TopkLogprobs:
    """token_ids and logprobs [length, k]."""
    length, k = token_ids.shape
    return pb.TopkLogprobs(
        token_ids=token_ids.astype("<i4").tobytes(),
        logprobs=logprobs.astype("<f4").tobytes(),
        k=k,
        length=length,
    )
