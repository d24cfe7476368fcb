"""Take an adapter home: train it, export it in PEFT's format and merged into its base, and load both in
transformers.

The logprobs that transformers computes from either folder are compared with the service's own, token by
token: what was trained is what will be served. vLLM, SGLang and PEFT load the first folder as it is, anything
that reads Hugging Face models the second. Needs transformers and peft here, and the base model's folder or
hub id (--weights).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinsmith_cookbook import data, options, toys, tracking
from tinsmith_cookbook.data import Batches
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=30, short=10)
COMPARED = 16


def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[str, Any]:
    training = client.create_lora_training_client(
        settings.base, rank=settings.rank, seed=settings.seed
    ).result()
    file = toys.write(settings.out / "alpaca.jsonl", toys.json_alpaca(toys.sums(200, settings.seed)))
    examples = data.examples(data.read(file), Renderer.of(training))

    for step, batch in enumerate(Batches(examples, 16, settings.steps, settings.seed)):
        datums = [data.datum(example) for example in batch]
        forward_backward = training.forward_backward(datums, "cross_entropy")
        optim_step = training.optim_step(tinker.AdamParams(learning_rate=2e-3))
        tracker.log(step, {"loss": forward_backward.result().metrics["loss:sum"] / data.counted(datums)})
        optim_step.result()

    compared = [data.datum(example) for example in examples[:COMPARED]]
    outputs = training.forward(compared, "cross_entropy").result().loss_fn_outputs
    ours = [output["logprobs"].to_numpy() for output in outputs]
    base = settings.weights or base_folder(training)
    adapter = training.export(settings.out / "peft", "peft")
    merged = training.export(settings.out / "merged", "merged", base=base, dtype="float32")
    return {
        "peft_difference": difference(ours, logprobs(base, compared, adapter)),
        "merged_difference": difference(ours, logprobs(str(merged), compared)),
        "untrained_difference": difference(ours, logprobs(base, compared)),
        "adapter_bytes": sum(file.stat().st_size for file in Path(adapter).iterdir()),
        "merged_bytes": sum(file.stat().st_size for file in Path(merged).iterdir()),
    }


def base_folder(training: tinker.TrainingClient) -> str:
    """Where the base model's weights are: a service on this machine names their folder, another one their hub
    id."""
    info = training.get_info().model_data
    return str(info.tokenizer_id or info.model_name)


def logprobs(folder: str, datums: Sequence[tinker.Datum], adapter: Path | None = None) -> list[Any]:
    """Of every target, as transformers computes them from `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    found = []
    with torch.no_grad():
        for datum in datums:
            scores = model(torch.tensor([datum.model_input.to_ints()])).logits[0].log_softmax(-1)
            targets = datum.loss_fn_inputs["target_tokens"].to_torch()
            found.append(scores.gather(1, targets[:, None])[:, 0].numpy())
    return found


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest of any token."""
    return float(max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)))


def parser() -> argparse.ArgumentParser:
    made = options.parser("export", __doc__, STEPS)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument(
        "--weights", metavar="FOLDER_OR_HUB_ID", help="the base model's weights on this machine"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result = train(client, settings, tracker)
    tracking.draw(
        settings.out / "curve.png", f"Export, {settings.base}", {"loss": tracker.line("loss")}, xlabel="step"
    )
    tracking.write_result(settings.out, result)


if __name__ == "__main__":
    main()
