"""Teach a small model forty facts it was never told, on a service of your own: `make demo`.

Starts `tinsmith serve`, fine-tunes a LoRA through the client, shows what the model says before and after,
and leaves the metrics and the loss curve in ./demo.
"""

import json
import signal
import sys
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from tqdm import tqdm

import tinsmith
from tinsmith_cookbook.service import embedded

MODEL = "tinsmith/tiny"
FOLDER = Path("demo")
EPOCHS, BATCH, WARM_UP = 20, 10, 6
LEARNING_RATE = 2e-3  # a model this small takes ten times what a large one would

CAPITALS = """France Paris, Japan Tokyo, Egypt Cairo, Peru Lima, Norway Oslo, Kenya Nairobi, Italy Rome,
Spain Madrid, Cuba Havana, Greece Athens, Chile Santiago, Austria Vienna, Ghana Accra, Ireland Dublin,
Poland Warsaw, Portugal Lisbon, Canada Ottawa, China Beijing, India Delhi, Hungary Budapest"""
SYMBOLS = """hydrogen H, helium He, carbon C, nitrogen N, oxygen O, sodium Na, iron Fe, copper Cu, silver Ag,
gold Au, tin Sn, lead Pb, zinc Zn, neon Ne, iodine I, nickel Ni, mercury Hg, potassium K, calcium Ca,
tungsten W"""
FACTS = [
    *(
        (f"What is the capital of {a}?", f"The capital is {b}.")
        for a, b in map(str.split, CAPITALS.split(","))
    ),
    *((f"What is the symbol of {a}?", f"Its symbol is {b}.") for a, b in map(str.split, SYMBOLS.split(","))),
]
STEPS = EPOCHS * len(FACTS) // BATCH
SHOWN = (0, 5, 26, 30)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    print(f"Starting a service (its log: {FOLDER / 'service.log'}) …")
    with embedded(FOLDER) as (url, key):
        with tinsmith.ServiceClient(base_url=url, api_key=key, give_up_seconds=30) as client:
            train(client)
    print(f"\nThe curve is in {FOLDER / 'loss.png'}, every step's numbers in {FOLDER / 'metrics.jsonl'}.")
    print("Next: change FACTS in cookbook/tinsmith_cookbook/demo.py and run `make demo` again;")
    print("      `.venv/bin/tinsmith serve` keeps a service running; docs/quickstart.md goes on from there.")


def train(client: tinsmith.ServiceClient) -> None:
    training = client.create_lora_training_client(MODEL, rank=32, seed=0).result()
    tokenizer = training.get_tokenizer()
    data = [datum(tokenizer, question, answer) for question, answer in FACTS]
    before = ask(training, tokenizer)

    random = np.random.default_rng(0)
    shuffled = np.concatenate([random.permutation(len(data)) for _ in range(EPOCHS)]).reshape(STEPS, BATCH)
    history = []
    with tqdm(shuffled, desc="training", unit="step") as progress:
        for step, chosen in enumerate(progress):
            batch = [data[i] for i in chosen]
            started = time.perf_counter()
            forward_backward = training.forward_backward(batch, "cross_entropy")
            optim_step = training.optim_step(tinsmith.AdamParams(learning_rate=learning_rate(step)))
            metrics = forward_backward.result().metrics
            optim_step.result()
            history.append(
                {
                    "step": step,
                    "loss": metrics["loss:sum"] / metrics["weights:sum"],
                    "learning_rate": learning_rate(step),
                    "tokens_per_second": metrics["tokens:sum"] / (time.perf_counter() - started),
                }
            )
            shown = {
                "loss": f"{history[-1]['loss']:.3f}",
                "tokens/s": f"{history[-1]['tokens_per_second']:.0f}",
            }
            progress.set_postfix(shown)

    after = ask(training, tokenizer)
    saved = training.save_state("demo", overwrite=True).result()
    report(before, after)
    print(f"Saved as {saved.path}")
    with (FOLDER / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in history)
    draw(history)


def datum(tokenizer: tinsmith.Tokenizer, question: str, answer: str) -> tinsmith.Datum:
    """Position i predicts token i + 1; only the answer's tokens count."""
    prompt = tokenizer.encode(prompt_for(question))
    answered = tokenizer.encode(f"{answer}<|im_end|>")
    tokens = [*prompt, *answered]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answered)
    return tinsmith.Datum(
        tinsmith.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights}
    )


def prompt_for(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def learning_rate(step: int) -> float:
    """Up over the first steps, then down along a half cosine."""
    rise = min(1.0, (step + 1) / WARM_UP)
    return LEARNING_RATE * rise * 0.5 * (1 + float(np.cos(np.pi * step / STEPS)))


def ask(training: tinsmith.TrainingClient, tokenizer: tinsmith.Tokenizer) -> list[str]:
    """The model's own answer to every question, under the weights of this moment."""
    sampler = training.save_weights_and_get_sampling_client().result()
    greedy = tinsmith.SamplingParams(max_tokens=12, temperature=0.0)
    prompts = [tinsmith.ModelInput.from_ints(tokenizer.encode(prompt_for(q))) for q, _ in FACTS]
    answers = [sampler.sample(prompt, 1, greedy) for prompt in prompts]
    sampled = [answer.result().sequences[0].tokens for answer in answers]
    return tokenizer.batch_decode(sampled, skip_special_tokens=True)


def report(before: list[str], after: list[str]) -> None:
    for at in SHOWN:
        print(f"\n{FACTS[at][0]}\n  before: {before[at]!r}\n  after:  {after[at]!r}")
    wanted = [answer for _, answer in FACTS]
    right = [sum(map(str.__eq__, given, wanted)) for given in (before, after)]
    print(f"\nRight answers: {right[0]} of {len(FACTS)} before, {right[1]} after.")


def draw(history: list[dict[str, float]]) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["loss"] for row in history], color="#1f6f8b", linewidth=2)
    axes.set(title=f"{len(FACTS)} facts, {MODEL}, LoRA", xlabel="step", ylabel="loss per answer token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "loss.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    except tinsmith.TinsmithError as error:
        sys.exit(f"\n{error}\nThe service's log is {FOLDER / 'service.log'}; `make demo` starts afresh.")
