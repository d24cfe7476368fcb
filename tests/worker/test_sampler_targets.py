"""target_prompt_logprobs on the wire: what is asked and what is answered, dense and sparse."""

import numpy as np

from tinsmith.wire import datums, samples
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_worker import answers
from tinsmith_worker.contract import SampleOutput
from tinsmith_worker.intake import sample_input

SHAPE = (4, 3)
CROW, COLUMNS, TOKENS = [0, 2, 2, 3, 5], [0, 2, 1, 0, 1], [0, 7, 5, -1, 9]
LISTED = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]], bool)


def int64(values: list[int]) -> bytes:
    return np.array(values, "<i8").tobytes()


def sparse() -> pb.Tensor:
    csr = pb.SparseCsr(values=int64(TOKENS), crow_indices=int64(CROW), col_indices=int64(COLUMNS))
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_INT64, shape=SHAPE)


def task(targets: pb.Tensor) -> pb.SampleTask:
    prompt = np.arange(SHAPE[0] + 1, dtype="<i4").tobytes()
    return pb.SampleTask(prompt=prompt, num_samples=1, target_prompt_logprobs=targets)


def answer(targets: pb.Tensor, logprobs: "np.ndarray[tuple[int, int], np.dtype[np.float32]]") -> pb.Tensor:
    output = SampleOutput("r", [], target_prompt_logprobs=logprobs)
    return pb.SampleResponse.FromString(answers.sampled(output, task(targets))).target_prompt_logprobs


def test_a_cell_that_a_sparse_request_leaves_out_is_not_asked() -> None:
    found = sample_input("r", task(sparse())).target_prompt_logprobs
    assert found is not None
    assert found.tolist() == [[0, -1, 7], [-1, -1, -1], [-1, 5, -1], [-1, 9, -1]]


def test_a_sparse_request_is_answered_in_its_own_layout() -> None:
    logprobs = -np.arange(1, 13, dtype=np.float32).reshape(SHAPE)
    found = answer(sparse(), logprobs)
    assert (found.dtype, tuple(found.shape)) == (pb.DTYPE_FLOAT32, SHAPE)
    assert found.sparse_csr.crow_indices == int64(CROW)
    assert found.sparse_csr.col_indices == int64(COLUMNS)
    assert np.array_equal(datums.array(found), np.where(LISTED, logprobs, 0))


def test_a_dense_request_is_taken_and_answered_as_it_is() -> None:
    tokens = np.arange(12).reshape(SHAPE) - 1
    found = sample_input("r", task(samples.dense(tokens))).target_prompt_logprobs
    assert np.array_equal(found, tokens)
    logprobs = -np.arange(12, dtype=np.float32).reshape(SHAPE)
    assert np.array_equal(datums.array(answer(samples.dense(tokens), logprobs)), logprobs)
