"""One version of the official SDK, driven through what a user does with it. Runs in that version's environment:

    python -m tests.versions.drive URL KEY MODEL JWT_URL JWT_KEY PROJECT

Prints one JSON object: the version, the numbers it was given, its public methods and commands, and what came of
those that were driven. What a version lacks is left out; whatever else goes wrong ends it.
"""

import asyncio
import contextlib
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tinker
import torch
from click.testing import CliRunner, Result
from tinker import types
from tinker.cli.__main__ import main_cli

from tests.compatibility.recorder import ITS_OWN_FAULT, RECORDER, commands, methods

TEXT = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]


def supervised(tokens: list[int]) -> Any:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def prompt() -> Any:
    return types.ModelInput.from_ints(TEXT[:4])


def both(client: Any, name: str, *given: Any, **named: Any) -> list[Any]:
    """The results of a method that may be called twice, blocking and awaited; none if this version has none."""
    return [*blocking(client, name, *given, **named), *awaited(client, f"{name}_async", *given, **named)]


def blocking(client: Any, name: str, *given: Any, **named: Any) -> list[Any]:
    if not hasattr(client, name):
        return []
    found = getattr(client, name)(*given, **named)
    return [found.result() if hasattr(found, "result") else found]


def awaited(client: Any, name: str, *given: Any, **named: Any) -> list[Any]:
    async def call() -> Any:
        found = await getattr(client, name)(*given, **named)
        return await found if hasattr(found, "__await__") else found

    try:
        return [asyncio.run(call())] if hasattr(client, name) else []
    except AssertionError as error:
        if ITS_OWN_FAULT in str(error):  # no request was made; how it is recorded, the matrix checks
            return []
        raise


def logprobs(output: Any) -> list[float]:
    return [float(lp) for o in output.loss_fn_outputs for lp in o["logprobs"].data]


def train(run: Any, steps: int, learning_rate: float = 1e-2) -> list[float]:
    losses = []
    for _ in range(steps):
        passed = run.forward_backward([supervised(TEXT)], "cross_entropy")
        stepped = run.optim_step(
            types.AdamParams(learning_rate=learning_rate)
        )  # before the first is answered
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses


def made(client: Any) -> Any:
    """A client, whether it is given at once or promised."""
    return client.result() if hasattr(client, "result") else client


@contextlib.contextmanager
def found_under_its_name(model: str, folder: str) -> Iterator[None]:
    """A sampling client looks for its tokenizer under the model's name, on a hub or in the working directory."""
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
        Path(model).parent.mkdir(parents=True)
        Path(model).symlink_to(folder)
        yield


def trains(service: Any, model: str) -> dict[str, Any]:
    (found, *_) = both(service, "get_server_capabilities")
    assert [m.model_name for m in found.supported_models] == [model]
    run = made(service.create_lora_training_client(model, rank=4, seed=1))
    losses = train(run, 4)
    assert losses[-1] < losses[0], losses
    for info in both(run, "get_info"):
        assert (info.model_data.model_name, info.lora_rank) == (model, 4)
    assert run.get_tokenizer().decode(run.get_tokenizer().encode("two words")) == "two words"
    forward = [logprobs(f) for f in both(run, "forward", [supervised(TEXT)], "cross_entropy")]
    future = run.forward([supervised(TEXT)], "cross_entropy")
    forward.append(logprobs(asyncio.run(future.result_async())))
    if hasattr(tinker.APIFuture, "future"):
        forward.append(logprobs(future.future().result()))
    if hasattr(tinker.APIFuture, "coroutine"):
        forward.append(logprobs(asyncio.run(future.coroutine())))
    assert all(found == forward[0] for found in forward)
    (again,) = awaited(service, "create_lora_training_client_async", model, rank=4, seed=1)
    for expected in losses[:2]:
        (passed,) = awaited(again, "forward_backward_async", [supervised(TEXT)], "cross_entropy")
        assert passed.metrics["loss:sum"] == expected
        awaited(again, "optim_step_async", types.AdamParams(learning_rate=1e-2))
    return {"losses": losses, "forward": forward[0]}


def resumes(service: Any, model: str) -> dict[str, Any]:
    run = made(service.create_lora_training_client(model, rank=4, seed=2))
    train(run, 2)
    path = run.save_state("half").result().path
    (second,) = awaited(run, "save_state_async", "half-awaited")
    straight = train(run, 2)
    for continued in (
        made(service.create_training_client_from_state_with_optimizer(path)),
        *awaited(service, "create_training_client_from_state_with_optimizer_async", second.path),
    ):
        assert train(continued, 2) == straight, "resumed with its optimizer, it goes another way"
    weights_only = made(service.create_training_client_from_state(path))
    (other,) = awaited(service, "create_training_client_from_state_async", path)
    first = [train(continued, 2) for continued in (weights_only, other)]
    assert first[0] == first[1]
    assert first[0][0] == straight[0]
    assert first[0] != straight, "the optimizer came along"
    for name, expected in (("load_state_with_optimizer", straight), ("load_state", first[0])):
        blocking(run, name, path)
        assert train(run, 2) == expected, name
        awaited(run, f"{name}_async", path)
        assert train(run, 2) == expected, name
    return {"straight": straight, "weights only": first[0]}


def samples(service: Any, model: str) -> dict[str, Any]:
    run = made(service.create_lora_training_client(model, rank=8, seed=3))
    train(run, 60, learning_rate=3e-3)
    greedy = types.SamplingParams(max_tokens=8, temperature=0, stop=[])
    path = run.save_weights_for_sampler("named").result().path
    (second,) = awaited(run, "save_weights_for_sampler_async", "named-awaited")
    samplers = [
        run.save_weights_and_get_sampling_client("kept"),
        *awaited(run, "save_weights_and_get_sampling_client_async", "kept-awaited"),
        made(run.create_sampling_client(path)),
        *awaited(run, "create_sampling_client_async", second.path),
        made(service.create_sampling_client(model_path=path)),
        *awaited(service, "create_sampling_client_async", model_path=path),
    ]
    if hasattr(run, "save_weights_and_get_sampling_client_submit"):
        samplers += blocking(run, "save_weights_and_get_sampling_client_submit")
    if hasattr(tinker.SamplingClient, "from_sampler_handle"):
        samplers.append(made(tinker.SamplingClient.from_sampler_handle(samplers[0].get_sampler_handle())))
    for sampler in samplers:
        for found in both(sampler, "sample", prompt(), num_samples=1, sampling_params=greedy):
            assert list(found.sequences[0].tokens) == TEXT[4:], "what was trained is not what is sampled"
            assert len(found.sequences[0].logprobs) == 8
            assert found.sequences[0].stop_reason == "length"
    trained = logprobs(run.forward([supervised(TEXT)], "cross_entropy").result())
    for found in both(samplers[0], "compute_logprobs", types.ModelInput.from_ints(TEXT)):
        assert found[0] is None
        assert max(abs(a - b) for a, b in zip(found[1:], trained, strict=True)) < 5e-5
    drawn = types.SamplingParams(max_tokens=8, temperature=1.0, seed=7, stop=[])
    base = made(service.create_sampling_client(base_model=model))
    assert {*both(base, "get_base_model"), *both(samplers[2], "get_base_model")} == {model}
    with found_under_its_name(model, run.get_info().model_data.tokenizer_id):
        assert base.get_tokenizer().encode("a") == run.get_tokenizer().encode("a")
    found = base.sample(
        prompt(), 3, drawn, include_prompt_logprobs=True, topk_prompt_logprobs=2
    ).result()  # fmt: skip
    assert [row if row is None else len(row) for row in found.topk_prompt_logprobs] == [None, 2, 2, 2]
    return {"drawn": [list(s.tokens) for s in found.sequences], "prompt": found.prompt_logprobs[1:]}


def takes_custom_losses(service: Any, model: str) -> dict[str, Any]:
    """-sum(lp) is cross_entropy with weights of 1: the same loss, and the same step."""

    def negative_sum(_: Any, given: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -sum(lp.sum() for lp in given), {"tokens_seen": float(sum(lp.numel() for lp in given))}

    steps, after = [], []
    for way in (blocking, awaited, None):
        run = made(service.create_lora_training_client(model, rank=4, seed=4))
        if way is None:
            passed = run.forward_backward([supervised(TEXT)], "cross_entropy").result()
        else:
            name = "forward_backward_custom" + ("_async" if way is awaited else "")
            (passed,) = way(run, name, [supervised(TEXT)], negative_sum)
            assert passed.metrics["tokens_seen"] == len(TEXT) - 1
        steps.append(passed.metrics["loss:sum"])
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        after += train(run, 1)
    assert max(steps) - min(steps) < 1e-4 * steps[0], steps
    assert max(after) - min(after) < 1e-4 * after[0], after
    if hasattr(service, "create_custom_loss"):

        def loss(logprobs: Any, weights: Any) -> Any:
            return -(logprobs * weights).sum(), {}

        handle = service.create_custom_loss(loss, {"logprobs": 1, "weights": 1}).result()
        run = made(service.create_lora_training_client(model, rank=4, seed=4))
        passed = run.forward_backward_custom([supervised(TEXT)], handle).result()
        assert abs(passed.metrics["loss:sum"] - steps[-1]) < 1e-4 * steps[-1]
    return {"losses": after[-1:]}


def keeps_records(service: Any, model: str, project: str) -> dict[str, Any]:
    rest = service.create_rest_client()
    run = made(service.create_lora_training_client(model, rank=4, user_metadata={"who": "matrix"}))
    run_id = run.get_info().model_id
    session = run_id.split(":")[0]
    train(run, 1)
    paths = [run.save_state(f"state-{n}").result().path for n in range(4)]
    sampler_path = run.save_weights_for_sampler("sampler").result().path
    for found in (
        *both(rest, "get_training_run", run_id),
        *both(rest, "get_training_run_by_tinker_path", paths[0]),
    ):
        assert (found.base_model, found.lora_rank) == (model, 4)
        assert found.last_checkpoint.tinker_path == paths[-1]
    for found in both(rest, "list_training_runs", limit=100):
        assert run_id in [r.training_run_id for r in found.training_runs]
    for found in (*both(rest, "list_checkpoints", run_id), *both(rest, "list_user_checkpoints", limit=1000)):
        assert {*paths, sampler_path} <= {c.tinker_path for c in found.checkpoints}
    (info,) = blocking(rest, "get_weights_info_by_tinker_path", paths[0])
    assert (info.base_model, info.lora_rank) == (model, 4)
    for found in both(rest, "get_session", session):
        assert run_id in found.training_run_ids
    for found in both(rest, "list_sessions"):
        assert session in found.sessions
    sampler = made(service.create_sampling_client(model_path=sampler_path))
    sampler.compute_logprobs(prompt()).result()
    sampler_id = rest.get_session(session).result().sampler_ids[-1]
    for found in both(rest, "get_sampler", sampler_id):
        assert (found.base_model, found.model_path) == (model, sampler_path)

    both(rest, "publish_checkpoint_from_tinker_path", paths[0])
    both(rest, "set_checkpoint_ttl_from_tinker_path", paths[0], 7200)
    (listed,) = [c for c in rest.list_checkpoints(run_id).result().checkpoints if c.tinker_path == paths[0]]
    assert listed.public
    assert getattr(listed, "expires_at", "not told") is not None
    both(rest, "unpublish_checkpoint_from_tinker_path", paths[0])
    for name, given in (
        ("get_checkpoint_archive_url", (run_id, paths[0].split("/", 3)[3])),
        ("get_checkpoint_archive_url_from_tinker_path", (paths[0],)),
    ):
        for archive in both(rest, name, *given):
            with (
                urllib.request.urlopen(archive.url) as answer,
                tarfile.open(fileobj=answer, mode="r|*") as tar,
            ):
                assert "adapter_config.json" in tar.getnames()
    for copied in (
        *both(rest, "copy_weights", paths[0], project),
        *blocking(service, "copy_weights", paths[0]),
    ):
        assert copied != paths[0]
        assert made(service.create_training_client_from_state(copied)).get_info().lora_rank == 4
    external = [
        *blocking(run, "save_weights_external", "out"),
        *awaited(run, "save_weights_external_async", "out2"),
    ]
    for saved in external:
        for found in both(rest, "get_external_weights_urls", saved.path):
            assert set(found.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    both(rest, "assign_session_project", session, project)
    for url in both(rest, "export_session_trace", session):
        with urllib.request.urlopen(url) as answer:
            assert json.load(answer)["traceEvents"]
    if hasattr(rest, "search_sessions"):
        asked = types.SessionSearchRequest(session_id=session)
        assert [s.session_id for s in rest.search_sessions(asked).result().sessions] == [session]
    today = datetime.datetime.now(datetime.UTC)
    hour = today.replace(minute=0, second=0, microsecond=0)
    window = (hour - datetime.timedelta(hours=1), hour + datetime.timedelta(hours=1))
    admins = [rest, *([tinker.AdminClient()] if hasattr(tinker, "AdminClient") else [])]
    for admin in admins:
        for found in both(admin, "get_audit_log", day=today.date()):
            assert paths[0] in [entry.tinker_path for entry in found.entries]
        for found in both(admin, "get_billing_usage", *window):
            assert "training" in {event.event_info.type for event in found.data}
        for found in both(admin, "get_current_checkpoint_storage_usage"):
            assert sum(item.checkpoint_count for item in found.data) >= len(paths)
    both(rest, "get_server_capabilities")

    ids = [path.split("/", 3)[3] for path in paths]
    blocking(rest, "delete_checkpoint", run_id, ids[0])
    awaited(rest, "delete_checkpoint_async", run_id, ids[1])
    blocking(rest, "delete_checkpoint_from_tinker_path", paths[2])
    awaited(rest, "delete_checkpoint_from_tinker_path_async", paths[3])
    left = {c.tinker_path for c in rest.list_checkpoints(run_id).result().checkpoints}
    assert not left & set(paths)
    assert {str(getattr(c, "get_console_url", lambda: "")()) for c in (service, run)}
    return {}


def has_a_command_line(service: Any, model: str, home: Path) -> dict[str, Any]:
    run = made(service.create_lora_training_client(model, rank=4))
    run_id = run.get_info().model_id
    train(run, 1)
    path = run.save_state("state").result().path
    hour = datetime.datetime.now(datetime.UTC).replace(minute=0, second=0, microsecond=0)
    window = [(hour + datetime.timedelta(hours=h)).isoformat() for h in (-1, 1)]
    has = commands()

    def said(*words: str, in_it: str = "") -> None:
        if f"tinker {' '.join(words[:2])}" in has or f"tinker {words[0]}" in has:
            found = command_line(home, "-f", "json", *words)
            assert found.exit_code == 0, (words, found.output, found.exception)
            assert in_it in found.output, (words, found.output)

    said("version", in_it="tinker")
    said("model", "list", in_it=model)
    said("run", "list", "--limit", "0", in_it=run_id)
    said("run", "info", run_id, in_it=run_id)
    said("checkpoint", "list", in_it=path)
    said("checkpoint", "list", "--run-id", run_id, in_it=path)
    said("checkpoint", "publish", path)
    said("checkpoint", "info", path, in_it=path)
    said("checkpoint", "unpublish", path)
    said("checkpoint", "set-ttl", path, "--ttl", "7200")
    said("checkpoint", "download", path, "-o", str(home / "weights"))
    assert list((home / "weights").rglob("adapter_config.json"))
    said("session", "export-trace", run_id.split(":")[0], "-o", str(home / "trace.json"))
    said("billing", "usage", *window, in_it="training")
    said("billing", "checkpoint-storage", in_it="size")
    said("auth", "status")
    said("checkpoint", "delete", "--run-id", run_id, "-y")
    return {}


def closes(service: Any) -> dict[str, Any]:
    blocking(service, "close", "success")
    return {}


def command_line(home: Path, *words: str, given: str = "", **variables: str) -> Result:
    """What the command line does with these words, without a process of its own: it starts slowly."""
    found = CliRunner().invoke(main_cli, list(words), input=given, env={"HOME": str(home), **variables})
    RECORDER.command(words, found.exit_code, f"{found.output}{found.exception or ''}")
    return found


def command_line_apart(home: Path, *words: str, given: str = "", **variables: str) -> str:
    """The same in a process of its own: the SDK keeps what the first service told it. What it said."""
    command = [str(Path(sys.executable).with_name("tinker")), *words]
    own = {**os.environ, "HOME": str(home), **variables}
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=300, input=given)
    RECORDER.command(words, done.returncode, done.stdout + done.stderr)
    assert done.returncode == 0, done
    return done.stdout


def knows_who_it_is(url: str, key: str, home: Path) -> dict[str, Any]:
    """On a service that exchanges keys for tokens."""
    with_key = {"TINKER_BASE_URL": url, "TINKER_API_KEY": key}
    os.environ |= with_key
    rest = tinker.ServiceClient().create_rest_client()
    for who in blocking(rest, "whoami"):
        assert who.email == "ann@lab.org"
    has = commands()
    if "tinker auth whoami" in has:
        assert "ann@lab.org" in command_line_apart(home, "auth", "whoami", **with_key)
    if "tinker auth login" in has:
        stored = {"TINKER_BASE_URL": url, "TINKER_API_KEY": ""}
        assert "ann@lab.org" in command_line_apart(home, "auth", "login", given=f"{key}\n", **stored)
        command_line_apart(home, "auth", "logout", **stored)
    return {}


def main(url: str, key: str, model: str, jwt_url: str, jwt_key: str, project: str) -> None:
    os.environ |= {"TINKER_BASE_URL": url, "TINKER_API_KEY": key, "TINKER_PROJECT_ID": project}
    RECORDER.attach()
    numbers: dict[str, Any] = {}
    driven: dict[str, dict[str, str]] = {}

    def play(scene: Callable[..., dict[str, Any]], *given: Any) -> None:
        RECORDER.seen = driven[scene.__name__] = {}
        numbers.update({f"{scene.__name__}: {name}": its for name, its in scene(*given).items()})

    with tempfile.TemporaryDirectory() as folder:
        service = tinker.ServiceClient()
        for scene in (trains, resumes, samples, takes_custom_losses):
            play(scene, service, model)
        play(keeps_records, service, model, project)
        play(has_a_command_line, service, model, Path(folder))
        play(closes, service)
        del os.environ["TINKER_PROJECT_ID"]
        play(knows_who_it_is, jwt_url, jwt_key, Path(folder))
    found = {"numbers": numbers, "has": [*methods(), *commands()], "driven": driven}
    print(json.dumps({"version": importlib.metadata.version("tinker"), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
