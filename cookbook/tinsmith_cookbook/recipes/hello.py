"""The smallest loop: teach a model one sentence, and hear it say so."""

import argparse
from collections.abc import Sequence

from tinsmith_cookbook import answers, data, options, tracking
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=20, short=20)
QUESTION = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "I am a small model, and I was taught this."}


def parser() -> argparse.ArgumentParser:
    return options.parser("hello", __doc__, STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with connect(settings.out) as client, tracking.Tracker(settings.out, also=settings.track) as tracker:
        training = client.create_lora_training_client(settings.base, rank=8, seed=settings.seed).result()
        renderer = Renderer.of(training)
        batch = [data.datum(example) for example in renderer.examples([QUESTION, ANSWER])]

        for step in range(settings.steps):
            forward_backward = training.forward_backward(batch, "cross_entropy")
            optim_step = training.optim_step(tinker.AdamParams(learning_rate=2e-3))
            tracker.log(step, {"loss": forward_backward.result().metrics["loss:sum"]})
            optim_step.result()

        sampler = training.save_weights_and_get_sampling_client().result()
        (said,) = answers.greedy(sampler, renderer, [[QUESTION]])

    losses = tracker.column("loss")
    tracking.draw(settings.out / "curve.png", "Hello", {"loss": tracker.line("loss")}, xlabel="step")
    result = {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "right": float(said.message["content"] == ANSWER["content"]),
        "answer": said.message["content"],
    }
    tracking.write_result(settings.out, result)


if __name__ == "__main__":
    main()
