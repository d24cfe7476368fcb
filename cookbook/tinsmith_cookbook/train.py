"""`tinsmith train config.yaml`: data, training, evaluation and export from one file.

It runs the recipe that the file asks for (rl: dpo, kto, orpo, grpo; without it supervised; or any other by
its name) and prints the command, which does the same without the file.
"""

import argparse
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tinsmith
from tinsmith_cookbook import config, data, service
from tinsmith_cookbook.config import BadConfig, Config


def command(chosen: Config, *, resume: bool = False) -> tuple[str, list[str]]:
    """The recipe's name and its arguments."""
    said = ["--base", chosen.base_model, "--out", str(chosen.output_dir), "--seed", str(chosen.seed)]
    said += [word for tracker in chosen.report_to for word in ("--track", tracker)]
    if chosen.recipe:
        said += ["--steps", str(chosen.max_steps)] if chosen.max_steps else []
        return chosen.recipe, said + config.read_options(chosen.recipe, chosen.options)
    said += ["--learning-rate", str(chosen.learning_rate), "--rank", str(chosen.lora_r)]
    if chosen.rl == "grpo":
        said += ["--steps", str(chosen.max_steps), "--problems", str(chosen.batch)]
        return "rl", [*said, "--group", str(chosen.num_generations)]

    said += ["--batch", str(chosen.batch), "--val-set-size", str(chosen.val_set_size)]
    said += ["--warmup-ratio", str(chosen.warmup_ratio), "--schedule", chosen.lr_scheduler]
    said += ["--clip", str(chosen.max_grad_norm), "--eval-every", str(chosen.eval_steps)]
    said += ["--steps", str(chosen.max_steps)] if chosen.max_steps else ["--epochs", str(chosen.num_epochs)]
    forms = ["" if d.type in (None, "preference") else f"{d.type}:" for d in chosen.datasets]
    files = [f"{form}{d.path}" for form, d in zip(forms, chosen.datasets, strict=True)]
    said += [word for file in files for word in ("--data", file)]
    if chosen.rl:
        return "dpo", [*said, "--loss", chosen.rl, "--beta", str(chosen.beta)]

    said += ["--sequence-len", str(chosen.sequence_len), "--patience", str(chosen.early_stopping_patience)]
    said += ["--save-every", str(chosen.save_steps)]
    said += ["--packing"] * chosen.sample_packing + ["--resume"] * resume
    return "sft", said


def export(out: Path, form: Literal["peft", "merged"]) -> Path:
    """The checkpoint that the recipe left, in out/<form>."""
    path = json.loads((out / "result.json").read_text())["path"]
    with service.connect(out) as client:
        training = client.create_training_client_from_state(path).result()
        base = str(training.get_info().model_data.tokenizer_id) if form == "merged" else None
        return training.export(out / form, form, base=base)


def check(chosen: Config) -> int:
    """How many rows there are to learn from; 0 for what makes its own. Raises BadData, before a service is
    started, if some are bad."""
    if chosen.rl:
        return sum(len(data.read_pairs(dataset.path)) for dataset in chosen.datasets)
    forms = [None if d.type == "preference" else d.type for d in chosen.datasets]
    return sum(len(data.read(d.path, form)) for d, form in zip(chosen.datasets, forms, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tinsmith train", description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML file; cookbook/examples has one for each kind")
    parser.add_argument("--resume", action="store_true", help="go on where the run in output_dir stands")
    parser.add_argument("--check", action="store_true", help="read the file and the data, and stop there")
    given = parser.parse_args(argv)
    try:
        chosen = config.read(given.config)
        rows = check(chosen)
    except (BadConfig, data.BadData) as error:
        sys.exit(f"tinsmith: {error}")
    if given.resume and (kind := chosen.rl or chosen.recipe):
        sys.exit(f"tinsmith: --resume goes with supervised training; {kind} starts afresh")
    recipe, arguments = command(chosen, resume=given.resume)
    print(f"{rows} rows. python -m tinsmith_cookbook.recipes.{recipe} {shlex.join(arguments)}", flush=True)
    if given.check:
        return
    importlib.import_module(f"tinsmith_cookbook.recipes.{recipe}").main(arguments)
    if chosen.export:
        print(f"Exported to {export(chosen.output_dir, chosen.export)}")


if __name__ == "__main__":
    try:
        main()
    except tinsmith.TinsmithError as error:
        sys.exit(f"tinsmith: {error}")
