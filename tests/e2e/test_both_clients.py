"""The same lines under `import tinker` and under `import tinsmith as tinker`: equal numbers."""

import asyncio
import importlib
from typing import Any

import pytest
import torch

from tests.conftest import RunningService

BASE = "tinsmith/tiny"
TEXT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
PACKAGES = ("tinker", "tinsmith")


def script(tinker: Any) -> dict[str, Any]:
    """As people write it: sync, clients used without .result(), torch and lists for inputs."""
    types = tinker.types
    service = tinker.ServiceClient(user_metadata={"who": "test"})
    training = service.create_lora_training_client(base_model=BASE, rank=8, seed=7)
    tokens = types.ModelInput.from_ints(TEXT[:-1])
    dense = {"target_tokens": TEXT[1:], "weights": [1.0] * (len(TEXT) - 1)}
    weights = torch.zeros(len(TEXT) - 1, 24)
    weights[2, 5] = 0.5
    sparse = {"target_tokens": (weights * 20).long(), "weights": weights}
    data = [types.Datum(model_input=tokens, loss_fn_inputs=dense), types.Datum(tokens, sparse)]
    found: dict[str, Any] = {"losses": [], "grad_norms": []}
    for _ in range(3):
        passed = training.forward_backward(data, loss_fn="cross_entropy")
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))
        found["losses"].append(passed.result().metrics["loss:sum"])
        found["grad_norms"].append(stepped.result().metrics["grad_norm"])

    def custom(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss = sum((lp**2).mean() for lp in logprobs)
        return loss, {"own": 1.5}

    metrics = training.forward_backward_custom(data[:1], custom).result().metrics
    found["custom"] = {name: metrics[name] for name in ("loss:sum", "surrogate_loss:sum", "own")}
    policy = {
        name: types.TensorData(data=values, dtype="float32", shape=[len(values)])
        for name, values in (("logprobs", [-1.0] * 11), ("advantages", [0.5, -0.5] * 5 + [1.0]))
    }
    policy["target_tokens"] = types.TensorData.from_torch(torch.tensor(TEXT[1:]))
    passed = training.forward_backward([types.Datum(tokens, policy)], "ppo", {"clip_low_threshold": 0.9})
    found["ppo"] = dict(passed.result().metrics)
    training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    path = training.save_state(name="both", overwrite=True).result().path
    resumed = service.create_training_client_from_state_with_optimizer(path)
    output = resumed.forward(data, "cross_entropy").result().loss_fn_outputs
    found["logprobs"] = [one["logprobs"].tolist() for one in output]
    found["shapes"] = [one["logprobs"].to_torch().shape for one in output]
    sampler = training.save_weights_and_get_sampling_client(name="x")
    params = types.SamplingParams(max_tokens=6, seed=3, temperature=0.8, top_k=50, stop=[])
    sampled = sampler.sample(
        prompt=tokens,
        num_samples=2,
        sampling_params=params,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
    ).result()
    found["sampled"] = [(list(s.tokens), s.logprobs, s.stop_reason) for s in sampled.sequences]
    found["prompt"] = (sampled.prompt_logprobs, sampled.topk_prompt_logprobs)
    found["scored"] = sampler.compute_logprobs(tokens).result()
    tokenizer = training.get_tokenizer()
    found["text"] = tokenizer.decode(tokenizer.encode("Same words, same numbers."))
    found["eos"] = tokenizer.eos_token_id
    with pytest.raises(tinker.TinkerError) as failed:
        training.forward([types.Datum(types.ModelInput.from_ints([10**7]), dense)], "cross_entropy").result()
    found["failure"] = failed.type.__name__
    rest = service.create_rest_client()  # the official RestClient() remembers the first address it had
    run = rest.get_training_run(training.model_id).result()
    found["record"] = (run.base_model, run.lora_rank, run.last_checkpoint.checkpoint_type)
    found["checkpoints"] = len(rest.list_checkpoints(training.model_id).result().checkpoints)
    service.close("success").result()
    return found


async def concurrently(tinker: Any) -> dict[str, Any]:
    """As the cookbook's loops write it: futures awaited twice, many samples at once."""
    types = tinker.types
    service = tinker.ServiceClient()
    training = await service.create_lora_training_client_async(BASE, rank=4, seed=9)
    inputs = {"target_tokens": TEXT[1:], "weights": [1.0] * (len(TEXT) - 1)}
    data = [types.Datum(types.ModelInput.from_ints(TEXT[:-1]), inputs)]
    losses = []
    for _ in range(3):
        passed = await training.forward_backward_async(data, "cross_entropy")
        stepped = await training.optim_step_async(types.AdamParams(learning_rate=1e-2))
        losses.append((await passed.result_async()).metrics["loss:sum"])
        await stepped
    sampler = await training.save_weights_and_get_sampling_client_async()
    prompt = types.ModelInput.from_ints(TEXT[:3])
    answers = await asyncio.gather(
        *(
            sampler.sample_async(prompt, 1, types.SamplingParams(max_tokens=4, seed=seed, stop=[]))
            for seed in range(16)
        )
    )
    await service.close("success")
    return {"losses": losses, "sampled": [answer.sequences[0].tokens for answer in answers]}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_both_give_equal_numbers(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_API_KEY", service.key)
    packages = [importlib.import_module(name) for name in PACKAGES]
    theirs, ours = [script(package) for package in packages]
    failures = theirs.pop("failure"), ours.pop("failure")
    assert failures == ("RequestFailedError", "RequestFailed")
    assert theirs == ours
    theirs, ours = [asyncio.run(concurrently(package)) for package in packages]
    assert theirs == ours
