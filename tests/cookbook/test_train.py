"""One YAML file runs data, training, evaluation and export; what it cannot mean is refused with a sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import RunningService
from tests.test_house import ROOT
from tinsmith_cookbook import config, toys, train
from tinsmith_cookbook.config import BadConfig
from tinsmith_cookbook.recipes import sft, sweep
from tinsmith_cookbook.tracking import read

EXAMPLES = sorted((ROOT / "cookbook/examples").glob("*.yaml"))
RUBRIC = {"recipe": "rubric", "datasets": None, "learning_rate": None}
GOOD = {"learning_rate": 1e-3, "max_steps": 2, "datasets": [{"path": "rows.jsonl"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toys.write(tmp_path / "rows.jsonl", toys.json_alpaca(toys.sums(12, 0)))
    return tmp_path


def written(folder: Path, **changes: object) -> Path:
    said = {**GOOD, **changes}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in said.items() if value is not None}))
    return file


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_is_good_and_its_recipe_understands_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import import_module

    train.main([str(file), "--check"])
    assert "python -m tinsmith_cookbook.recipes." in capsys.readouterr().out
    recipe, arguments = train.command(config.read(file))
    read_by_recipe = import_module(f"tinsmith_cookbook.recipes.{recipe}").parser().parse_args(arguments)
    if config.read(file).recipe is None:
        assert read_by_recipe.learning_rate == config.read(file).learning_rate


def test_every_recipe_has_an_example() -> None:
    assert {train.command(config.read(file))[0] for file in EXAMPLES} == set(config.RECIPES)


def test_a_recipes_options_are_those_of_its_command_line(folder: Path) -> None:
    nothing = dict.fromkeys(GOOD)
    options = {"rates": [0.001, 0.01], "ranks": [4], "data": "rows.jsonl"}
    file = written(folder, **nothing | {"recipe": "sweep", "max_steps": 3, "options": options})
    recipe, arguments = train.command(config.read(file))
    found = sweep.parser().parse_args(arguments)
    assert (recipe, found.rates, found.ranks, found.data) == ("sweep", [0.001, 0.01], [4], "rows.jsonl")
    assert (found.steps, found.seed, found.base) == (3, 0, "tinsmith/tiny")


def test_the_form_that_a_file_names_is_the_one_that_is_read(folder: Path) -> None:
    """Rows that have two forms: the one of the file's choice is learnt from, and not the one that is guessed."""
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "chat"}]
    row = {"instruction": "Hello", "output": "alpaca", "messages": chat}
    (folder / "both.jsonl").write_text(json.dumps(row) + "\n")
    for form in ("alpaca", "chat"):
        file = written(folder, datasets=[{"path": "both.jsonl", "type": form}])
        recipe, arguments = train.command(config.read(file))
        assert recipe == "sft"
        (conversation,) = sft.read(sft.parser().parse_args(arguments))
        assert conversation.messages[-1]["content"] == form


def test_the_examples_data_is_what_the_generators_make() -> None:
    pairs = list(toys.sums(240, 0))
    rows = {
        "sums.alpaca.jsonl": toys.json_alpaca(pairs[:160]),
        "sums.sharegpt.jsonl": toys.json_sharegpt(pairs[160:]),
        "brevity.jsonl": [
            {"prompt": p.prompt[0]["content"], "chosen": p.chosen, "rejected": p.rejected}
            for p in toys.brevity(120, 0)
        ],
    }
    for name, made in rows.items():
        kept = [json.loads(row) for row in (ROOT / "cookbook/examples" / name).read_text().splitlines()]
        assert kept == made, name


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"learning_rate": None}, "learning_rate is missing"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0"),
        ({"lr": 1e-3}, "lr: there is no such key. The keys are base_model"),
        ({"lora_alpha": 16}, "lora_alpha: alpha is fixed by the service"),
        ({"per_device_train_batch_size": 4}, "it is called micro_batch_size here"),
        ({"max_steps": None}, "give num_epochs or max_steps"),
        ({"num_epochs": 1}, "give num_epochs or max_steps, one of them"),
        ({"datasets": None}, "datasets is missing"),
        ({"datasets": [{"path": "gone.jsonl"}]}, "gone.jsonl does not exist"),
        ({"datasets": [{"path": "rows.jsonl", "type": "parquet"}]}, "datasets.0.type: Input should be"),
        ({"datasets": [{"path": "rows.jsonl", "type": "preference"}]}, "needs rl: dpo, kto or orpo"),
        ({"rl": "dpo", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}, "of type preference"),
        ({"rl": "dpo", "sample_packing": True}, "rl: dpo makes no use of sample_packing: leave it out"),
        ({"rl": "dpo", "val_set_size": 0}, "val_set_size must be above 0"),
        ({"beta": 0.1}, "supervised training makes no use of beta"),
        ({"rl": "grpo", "datasets": None, "warmup_ratio": 0.1}, "rl: grpo makes no use of warmup_ratio"),
        ({"rl": "grpo"}, "makes its own problems"),
        ({"rl": "ppo2"}, "rl: Input should be"),
        ({"recipe": "rubrik"}, "there is no recipe 'rubrik': there are distill, dpo, evaluate"),
        ({"recipe": "rubric"}, "with a recipe datasets, learning_rate goes under options"),
        (RUBRIC | {"options": {"judge": "me"}}, "options of rubric: argument --judge: invalid choice: 'me'"),
        (
            RUBRIC | {"options": {"jugde": "model"}},
            "options of rubric: unrecognized arguments: --jugde model",
        ),
        (RUBRIC | {"options": {"judg": "model"}}, "options of rubric: unrecognized arguments: --judg model"),
        (RUBRIC | {"options": {"seed": 3}}, "options: seed is called seed here, and stands by itself"),
        (RUBRIC | {"options": {"out": "x"}}, "options: out is called output_dir here, and stands by itself"),
        (RUBRIC | {"export": "peft"}, "with a recipe export goes under options"),
        ({"options": {"judge": "model"}}, "supervised training makes no use of options"),
    ],
)
def test_what_a_file_cannot_mean_is_refused(folder: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadConfig) as error:
        config.read(written(folder, **changes))
    assert sentence in str(error.value)
    assert "config.yaml" in str(error.value)


def test_files_that_are_no_yaml_are_refused(folder: Path) -> None:
    file = folder / "x.yaml"
    for text, sentence in (("a: [", "cannot be read"), ("- 1", "is not a list of")):
        file.write_text(text)
        with pytest.raises(BadConfig, match=sentence):
            config.read(file)


def test_a_run_of_preferences_has_no_place_to_go_on_from(folder: Path) -> None:
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in toys.brevity(4, 0)]
    toys.write(folder / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match="--resume goes with supervised training"):
        train.main([str(written(folder, rl="dpo")), "--resume"])


def test_bad_rows_are_named_before_a_service_is_started(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"instruction": "Add.", "output": ""}')
    with pytest.raises(SystemExit, match="line 1: 'output' is missing"):
        train.main([str(written(folder))])


def test_tinsmith_train_runs_the_file(in_environment: RunningService, folder: Path) -> None:
    file = written(folder, output_dir=str(folder / "out"), val_set_size=0.2, micro_batch_size=2, eval_steps=1)
    for more in ([], ["--resume"]):
        done = subprocess.run(
            [sys.executable, "-m", "tinsmith_api.cli", "train", *more, str(file)],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "12 rows. python -m tinsmith_cookbook.recipes.sft --base tinsmith/tiny" in done.stdout
    assert [row["step"] for row in read(folder / "out/metrics.jsonl")] == [0, 1]
    done = subprocess.run(
        [sys.executable, "-m", "tinsmith_api.cli", "train", "--check", str(folder / "none.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("tinsmith: ")
    assert "Traceback" not in done.stderr
