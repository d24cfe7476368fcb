"""What goes beyond the official SDK: curves, costs, forks, exports, logprobs, losses by handle."""

from pathlib import Path

import numpy as np
import pytest
import torch

import tinsmith
from tests.client.stub import Answer, Request, Stub
from tests.client.test_training_client import answer_every_pass, datum, passes
from tinsmith.types import Datum, ModelInput

RUN = "s1:train:0"


def checkpoint(name: str, kind: str = "training") -> dict[str, str]:
    segment = {"training": "weights", "sampler": "sampler_weights"}[kind]
    path = f"tinker://{RUN}/{segment}/{name}"
    return {"checkpoint_id": f"{segment}/{name}", "checkpoint_type": kind, "tinker_path": path}


def test_the_curve_is_a_table(stub: Stub, training: tinsmith.TrainingClient, tmp_path: Path) -> None:
    pages = {
        "0": {"rows": [{"seq_id": 1, "kind": "forward_backward", "loss:sum": 2.5}], "next": 1},
        "1": {"rows": [{"seq_id": 2, "kind": "optim_step", "grad_norm": 0.5}], "next": None},
    }
    stub.answers[f"training_runs/{RUN}/metrics"] = lambda request: Answer(
        body=pages[request.query.split("after=")[1].split("&")[0]]
    )
    table = training.metrics()
    assert table.columns == ["seq_id", "kind", "loss:sum", "grad_norm"]
    assert table.column("loss:sum") == [2.5, None]
    text = table.to_csv(tmp_path / "curve.csv")
    assert text == "seq_id,kind,loss:sum,grad_norm\n1,forward_backward,2.5,\n2,optim_step,,0.5\n"
    assert (tmp_path / "curve.csv").read_text() == text
    assert list(table.to_pandas()["kind"]) == ["forward_backward", "optim_step"]


def test_cost_has_what_the_service_noted(stub: Stub, training: tinsmith.TrainingClient) -> None:
    stub.answers[f"training_runs/{RUN}/cost"] = lambda request: Answer(
        body={"tokens": 5, "calls": 2, "steps": 1, "storage_bytes": 9, "usage": {"sample": 3}, "later": 1}
    )
    cost = training.cost()
    assert (cost.tokens, cost.steps, cost.storage_bytes, cost.usage) == (5, 1, 9, {"sample": 3})
    assert cost.compute_seconds is None


def test_a_fork_of_now_comes_after_the_calls_made_so_far(
    stub: Stub, training: tinsmith.TrainingClient
) -> None:
    def save(request: Request) -> Answer:
        path = f"tinker://{RUN}/weights/{request.json['path']}"
        stub.results["saved"] = Answer(body={"path": path})
        return Answer(body={"request_id": "saved"})

    stub.answers["save_weights"] = save
    training.optim_step()
    fork = training.fork()
    assert fork.model_id == "s1:train:1"
    (saved,), (loaded,) = stub.of("save_weights"), stub.of("load_weights")
    assert saved.json["seq_id"] == 2
    assert saved.json["ttl_seconds"] == 86400
    assert loaded.json == {
        "session_id": "s1",
        "model_seq_id": 1,
        "path": f"tinker://{RUN}/weights/{saved.json['path']}",
        "optimizer": True,
    }


def test_a_fork_of_then_finds_the_checkpoint(stub: Stub, training: tinsmith.TrainingClient) -> None:
    listed = [
        checkpoint("step-100"),
        checkpoint("step-2000"),
        checkpoint("best"),
        checkpoint("best", "sampler"),
    ]
    stub.answers[f"training_runs/{RUN}/checkpoints"] = lambda request: Answer(body={"checkpoints": listed})
    for wanted in (100, "best", f"tinker://{RUN}/weights/best"):
        training.fork(wanted).result(10)
    paths = [request.json["path"].rpartition("/")[2] for request in stub.of("load_weights")]
    assert paths == ["step-100", "best", "best"]
    with pytest.raises(tinsmith.InvalidInput, match="it has best, step-100, step-2000"):
        training.fork(7).result(10)


def test_logprobs_of_whole_texts(stub: Stub, training: tinsmith.TrainingClient) -> None:
    answer_every_pass(stub)
    first, second = training.logprobs([[5, 6, 7], ModelInput.from_ints([8, 9])]).result(10)
    assert np.isnan(first[0])
    assert (first[1:].tolist(), second[1:].tolist()) == ([0, -1], [-2])
    (sent,) = passes(stub)
    assert sent.forward_only
    assert np.frombuffer(sent.data[0].loss_fn_inputs["target_tokens"].dense, "<i8").tolist() == [6, 7]


def test_a_loss_by_handle_reads_its_inputs(
    stub: Stub, client: tinsmith.ServiceClient, training: tinsmith.TrainingClient
) -> None:
    answer_every_pass(stub)

    def scaled(logprobs: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = -(logprobs * scale).sum()
        return loss, {"custom/seen:sum": torch.tensor(1.0), "custom/loss:mean": loss}

    handle = client.create_custom_loss(scaled, {"logprobs": 1, "scale": 1}).result(10)
    data = [datum([1, 2], scale=[2.0, 3.0]), datum([3], scale=[4.0])]
    metrics = training.forward_backward_custom(data, handle).result(10).metrics
    assert metrics["loss:sum"] == 3 + 8
    assert (metrics["custom/seen:sum"], metrics["custom/loss:mean"]) == (2, 5.5)
    backward = passes(stub)[1]
    sent = [np.frombuffer(d.loss_fn_inputs["weights"].dense, "<f4").tolist() for d in backward.data]
    assert sent == [[2, 3], [4]]
    with pytest.raises(tinsmith.InvalidInput, match="has no 'scale'"):
        training.forward_backward_custom([datum([1])], handle).result(10)
    with pytest.raises(tinsmith.InvalidInput, match="rank"):
        training.forward_backward_custom([datum([1], scale=[[1.0]])], handle).result(10)
    with pytest.raises(tinsmith.InvalidInput, match="logprobs"):
        client.create_custom_loss(scaled, {"scale": 1})


def test_an_export_is_the_files_that_the_service_names(
    stub: Stub, training: tinsmith.TrainingClient, tmp_path: Path
) -> None:
    files = {"adapter_config.json": b"{}", "deep/adapter_model.safetensors": b"x" * 3_000_000}
    urls = {name: f"{stub.url}/files/{name}" for name in files}

    def save(request: Request) -> Answer:
        path = f"tinker://{RUN}/external_weights/{request.json['path']}"
        stub.results["exported"] = Answer(body={"path": path})
        route = f"training_runs/{RUN}/checkpoints/external_weights/{request.json['path']}"
        stub.answers[f"{route}/external_weights_urls"] = lambda request: Answer(
            body={"urls": urls, "expires": "2030-01-01T00:00:00Z"}
        )
        return Answer(body={"request_id": "exported"})

    stub.answers["save_weights_external"] = save
    for name, content in files.items():
        stub.answers[f"/files/{name}"] = lambda request, content=content: Answer(body=content)
    assert training.export(tmp_path / "out") == tmp_path / "out"
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert not list(tmp_path.rglob("*.part"))
    # Whoever has the address needs no key; it may lie elsewhere, and is told none.
    assert all("x-api-key" not in request.headers for request in stub.of("/files/adapter_config.json"))
    urls["../evil"] = f"{stub.url}/files/adapter_config.json"
    with pytest.raises(tinsmith.TinsmithError, match="outside of the folder"):
        training.export(tmp_path / "again")
    assert not (tmp_path / "evil").exists()
    urls.clear()
    urls["gone"] = f"{stub.url}/files/gone"
    stub.answers["/files/gone"] = lambda request: Answer(403, {"detail": "expired"})
    with pytest.raises(tinsmith.TinsmithError, match="gone cannot be fetched: 403"):
        training.export(tmp_path / "third")
    with pytest.raises(tinsmith.InvalidInput, match="gguf"):
        training.export(tmp_path, "gguf")  # type: ignore[arg-type]


def test_images_are_sent_as_the_wire_has_them(stub: Stub, training: tinsmith.TrainingClient) -> None:
    answer_every_pass(stub)
    from tinsmith import messages, types

    image = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=2)
    prompt = ModelInput.from_ints([1]).append(image)
    assert messages.json_prompt(prompt)["chunks"][1] == {
        "type": "image",
        "format": "png",
        "data": "iVBORw==",
        "expected_tokens": 2,
    }
    (request,) = messages.pack([Datum(prompt, {"target_tokens": [1, 2, 3]})], "cross_entropy")
    assert request.data[0].model_input[1].image.data == b"\x89PNG"
    pointer = types.ImageAssetPointerChunk(location="x", format="png")
    with pytest.raises(tinsmith.InvalidInput, match="image_asset_pointer"):
        messages.pack([Datum(ModelInput([pointer]), {})], "cross_entropy")
    with pytest.raises(tinsmith.InvalidInput, match="only text"):
        prompt.to_ints()
