"""The page of all recipes says what came out, and what did not."""

from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import RunningService
from tinsmith_cookbook import book
from tinsmith_cookbook.registry import RECIPES, Recipe


def test_every_recipe_of_the_registry_exists_and_takes_its_arguments() -> None:
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        module = import_module(f"tinsmith_cookbook.recipes.{recipe.module}")
        assert recipe.outcome, f"{recipe.name} states nothing that must come out"
        if hasattr(module, "parser"):
            module.parser().parse_args([*recipe.arguments, "--short", "--seed", "0"])


def test_every_recipe_there_is_stands_in_the_registry() -> None:
    folder = Path(book.__file__).parent / "recipes"
    modules = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert modules == {recipe.module for recipe in RECIPES}


def test_what_must_come_out_is_compared() -> None:
    recipe = Recipe("x", "X", "x", {"loss": (0, 1), "right": (0.5, 1)})
    assert recipe.misses({"loss": 0.5, "right": 1.0}) == []
    assert recipe.misses({"loss": 1.5}) == [
        "loss is 1.5, not between 0 and 1",
        "right is None, not between 0.5 and 1",
    ]
    assert recipe.misses({"loss": float("nan"), "right": 1})


def test_the_page_holds_the_numbers_the_faults_and_the_curves() -> None:
    recipe = Recipe("x", "X & Y", "x", {"loss": (0, 1)})
    result = {"loss": 0.25, "table": [{"rank": 8, "loss": 0.5}]}
    good = book.Run(recipe, 0, 3.0, "python -m x", result, [], b"PNG")
    other = book.Run(recipe, 1, 5.0, "python -m x", {"loss": 0.75}, [], b"PNG")
    page = book.page([good, other], "tinsmith/tiny", 60)
    assert "2 of 2 runs as they must be" in page
    assert "0.5 <small>(0.25 to 0.75)</small>" in page
    assert "X &amp; Y" in page
    assert page.count("data:image/png;base64,UE5H") == 2
    assert "http" not in page.replace("https://", "")  # self-contained
    bad = book.Run(recipe, 0, 3.0, "python -m x", {"loss": 2}, ["loss is <2>"], None)
    page = book.page([bad], "tinsmith/tiny", 60)
    assert "0 of 1 runs as they must be" in page
    assert "loss is &lt;2&gt;" in page


SLOW = """
import pathlib, sys, time
try:
    time.sleep(60)
finally:
    (pathlib.Path(sys.argv[-1]) / "tidied").touch()
"""


def test_a_recipe_that_takes_too_long_may_still_stop_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book, "LIMIT_SECONDS", 2)
    recipes = tmp_path / "tinsmith_cookbook/recipes"
    recipes.mkdir(parents=True)
    for name, text in (("../__init__.py", ""), ("__init__.py", ""), ("slow.py", SLOW)):
        (recipes / name).write_text(text)
    slow = Recipe("slow", "Slow", "slow", {})
    ended = book.run(slow, tmp_path / "out", 0, "m", {"PYTHONPATH": str(tmp_path)})
    assert ended.faults
    assert "stopped after 2 s" in ended.faults[0]
    assert (tmp_path / "out/slow/seed-0/tidied").exists()


def test_the_book_runs_a_recipe_and_one_that_fails(
    in_environment: RunningService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        book.main(["--only", "hello", "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert "1 of 1 runs as they must be" in (tmp_path / "index.html").read_text()
    with pytest.raises(SystemExit) as ended:
        book.main(["--only", "hello", "--out", str(tmp_path), "--base", "no/such"])
    assert ended.value.code == 1
    page = (tmp_path / "index.html").read_text()
    assert "no/such" in page
    assert "0 of 1 runs as they must be" in page
