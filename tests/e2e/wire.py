"""The wire by hand, for tests that need what no client would send."""

from typing import Any

import httpx
import numpy as np

from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith.wire.samples import dense

Json = dict[str, Any]


def datum(tokens: list[int], weights: list[float] | None = None, **inputs: Any) -> pb.Datum:
    """Next-token prediction on `tokens`."""
    given = np.array(tokens[:-1], np.int32)
    message = pb.Datum()
    message.model_input.add().encoded_text.tokens = given.tobytes()
    message.loss_fn_inputs["target_tokens"].CopyFrom(dense(np.array(tokens[1:], np.int64)))
    if not inputs:
        inputs = {"weights": weights or [1.0] * len(given)}
    for name, values in inputs.items():
        message.loss_fn_inputs[name].CopyFrom(dense(np.asarray(values, np.float32)))
    return message


class Wire:
    """One key on one service. Methods answer with the decoded body; `status` of the last is kept."""

    def __init__(self, url: str, key: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": key}, timeout=120)
        self.status = 0

    def post(self, path: str, /, **body: Any) -> Json:
        return self._decode(self.http.post(path, json=body))

    def get(self, path: str, **query: Any) -> Json:
        return self._decode(self.http.get(path, params=query))

    def put(self, path: str, /, **body: Any) -> Json:
        return self._decode(self.http.put(path, json=body))

    def delete(self, path: str) -> Json:
        return self._decode(self.http.delete(path))

    def raw(self, path: str, content: bytes, **headers: str) -> Json:
        return self._decode(self.http.post(path, content=content, headers=headers))

    def session(self) -> str:
        return self.post("/create_session", tags=[])["session_id"]

    def run(self, model: str, *, session: str = "", number: int = 0, **lora: Any) -> str:
        """A new run, created; its id."""
        session = session or self.session()
        given = {"rank": 4, "seed": 1, **lora}
        made = self.post(
            "/create_model", session_id=session, model_seq_id=number, base_model=model, lora_config=given
        )
        assert self.status == 200, made
        return self.result(made)["model_id"]

    def submit(self, run: str, seq: int, *data: pb.Datum, loss: str = "cross_entropy", **fields: Any) -> Json:
        """A forward_backward."""
        config = fields.pop("config", {})
        message = pb.ForwardBackwardRequest(model_id=run, seq_id=seq, data=data, loss_fn=loss, **fields)
        for name, value in config.items():
            message.loss_fn_config_v2[name].number = value
        headers = {"content-type": "application/x-protobuf"}
        return self.raw("/forward_backward", message.SerializeToString(), **headers)

    def optim(self, run: str, seq: int, **adam: float) -> Json:
        return self.post("/optim_step", model_id=run, seq_id=seq, adam_params=adam)

    def sample(self, sampler: str, seq: int, prompt: list[int], **fields: Any) -> Json:
        chunks = [{"type": "encoded_text", "tokens": prompt}]
        params = {"max_tokens": 8, "seed": 1, "stop": [], **fields.pop("params", {})}
        return self.post(
            "/asample",
            sampling_session_id=sampler,
            seq_id=seq,
            prompt={"chunks": chunks},
            sampling_params=params,
            **fields,
        )

    def result(self, future: Json) -> Json:
        """A JSON result, or the failure with its keys `error` and `category`."""
        return self._decode(self.fetch(future))

    def output(self, future: Json) -> pb.ForwardBackwardOutput:
        answer = self.fetch(future, accept="application/x-protobuf")
        assert "protobuf" in answer.headers["content-type"], answer.text
        return pb.ForwardBackwardOutput.FromString(answer.content)

    def sampled(self, future: Json) -> pb.SampleResponse:
        answer = self.fetch(future, accept="application/x-protobuf")
        assert "protobuf" in answer.headers["content-type"], answer.text
        return pb.SampleResponse.FromString(answer.content)

    def fetch(self, future: Json, accept: str = "application/json") -> httpx.Response:
        for _ in range(100):
            answer = self.http.post("/retrieve_future", json=future, headers={"accept": accept})
            if answer.status_code != 408:
                return answer
        raise AssertionError(f"{future} never finished")

    def _decode(self, answer: httpx.Response) -> Json:
        self.status = answer.status_code
        return answer.json() if answer.content else {}


def logprobs(output: pb.ForwardBackwardOutput) -> np.ndarray:
    """All of an output's logprobs, one after another."""
    return np.concatenate([np.frombuffer(r.fields["logprobs"].data, "<f4") for r in output.loss_fn_outputs])
