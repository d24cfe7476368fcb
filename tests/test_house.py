"""The house rules that a reader could break without noticing."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "tinsmith": ROOT / "client/tinsmith",
    "tinsmith_api": ROOT / "api/tinsmith_api",
    "tinsmith_worker": ROOT / "worker/tinsmith_worker",
    "tinsmith_cookbook": ROOT / "cookbook/tinsmith_cookbook",
}
# What a room may import of the others.
ARROWS = {
    "tinsmith": (),
    "tinsmith_api": ("tinsmith",),
    "tinsmith_worker": ("tinsmith", "tinsmith_api.journal"),
    "tinsmith_cookbook": ("tinsmith",),
}
GENERATED = ("tinsmith_pb2.py", "tinsmith_pb2.pyi")


def imports(room: str) -> Iterator[tuple[str, str]]:
    """(file:line, module) of every import anywhere in a room; `from a import b` counts as a.b."""
    for file in sorted(ROOMS[room].rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                yield from ((place, name.name) for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{place}: import by full name"
                yield from ((place, f"{node.module}.{name.name}") for name in node.names)


def inside(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room: str) -> None:
    allowed = (room, *ARROWS[room])
    foreign = [
        f"{place} imports {module}"
        for place, module in imports(room)
        if any(inside(module, other) for other in ROOMS) and not any(inside(module, ok) for ok in allowed)
    ]
    assert not foreign


# Loads what was exported, as whoever takes it home does.
LOADS_MODELS = "cookbook/tinsmith_cookbook/recipes/export.py"


@pytest.mark.parametrize("room", ["tinsmith_api", "tinsmith_cookbook"])
def test_torch_stays_in_the_worker(room: str) -> None:
    heavy = ("torch", "transformers", "peft", "accelerate")
    found = [f"{place} imports {module}" for place, module in imports(room) if module.split(".")[0] in heavy]
    assert [place for place in found if not place.startswith(LOADS_MODELS)] == []


def test_importing_the_client_imports_nothing_heavy() -> None:
    script = """
import sys, tinsmith, tinsmith.errors, tinsmith.wire.losses
heavy = {"httpx", "torch", "pydantic", "google.protobuf", "numpy"} & set(sys.modules)
import tinsmith.wire.batch
heavy |= {"httpx", "torch", "pydantic", "google.protobuf"} & set(sys.modules)
assert tinsmith.ServiceClient.__name__ in tinsmith.__all__
print(sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_client_exists() -> None:
    import tinsmith

    assert [name for name in tinsmith.__all__ if not hasattr(tinsmith, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = tinsmith.Nothing


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_typed(room: str) -> None:
    assert (ROOMS[room] / "py.typed").exists()


def test_the_generated_codec_is_what_the_schema_says(tmp_path: Path) -> None:
    wire = ROOMS["tinsmith"] / "wire"
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(wire), *out, "tinsmith.proto"]
    subprocess.run(command, check=True)
    for name in GENERATED:
        assert (tmp_path / name).read_text() == (wire / name).read_text(), f"{name}: run `make proto`"


@pytest.mark.parametrize(
    "file", ["README.md", *(str(f.relative_to(ROOT)) for f in (ROOT / "docs").rglob("*.md"))]
)
def test_links_between_pages_resolve(file: str) -> None:
    text = (ROOT / file).read_text()
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    missing = [target for target in targets if not ((ROOT / file).parent / target).exists()]
    assert not missing
