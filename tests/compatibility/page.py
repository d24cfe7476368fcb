"""docs/compatibility.md, written from what tests drove: `make compatibility` runs them and writes it anew.

docs/compatibility.json is the record: by version of the official SDK, every public method and command it has, what
came of driving it, and a test that shows it.
"""

import json
from pathlib import Path

from tests.compatibility.recorder import WORKS

DOCS = Path(__file__).parents[2] / "docs"
RECORD = DOCS / "compatibility.json"
PAGE = DOCS / "compatibility.md"
NOT_DRIVEN = "not driven"
# Needs an account with Hugging Face.
OUT_OF_REACH = {"tinker checkpoint push-hf"}

Driven = dict[str, dict[str, str]]
"""By test: what it drove, with its outcome."""
Record = dict[str, dict[str, dict[str, str]]]


def load() -> Record:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def note(version: str, has: list[str], driven: Driven) -> None:
    """Put into the record what was driven without an error, and write the page."""
    record = load()
    record[version] = {name: {"state": NOT_DRIVEN} for name in sorted(has)}
    for test, its in driven.items():
        for name, outcome in its.items():
            entry = record[version].get(name)
            if entry is not None and entry["state"] != WORKS:
                entry |= {"state": outcome, "by": test}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(render(record))


def stale(version: str, has: list[str], driven: Driven) -> list[str]:
    """In what the record differs from a run, whole or in part."""
    known = load().get(version, {})
    found = [f"{name}: the SDK {'has' if name in has else 'lacks'} it" for name in sorted({*has} ^ {*known})]
    found += denied(version, driven)
    for name, entry in known.items():
        if entry.get("by") in driven and driven[entry["by"]].get(name, "not driven") != entry["state"]:
            found.append(f"{name}: {entry['by']} does not show that it {entry['state']}")
    return found


def denied(version: str, driven: Driven) -> list[str]:
    """What works, where the record says that it does not."""
    known = load().get(version, {})
    return [
        f"{name}: works in {test}"
        for test, its in driven.items()
        for name, outcome in its.items()
        if outcome == WORKS and known.get(name, {}).get("state") not in (WORKS, None)
    ]


def render(record: Record) -> str:
    versions = sorted(record, key=lambda v: [int(part) for part in v.split(".")], reverse=True)
    sentences: list[str] = []
    groups: dict[str, list[str]] = {}
    for name in sorted({name for version in versions for name in record[version]}):
        group = "The command line" if name.startswith("tinker ") else name.split(".")[0]
        groups.setdefault(group, []).append(name)
    lines = [HEAD]
    for group, names in groups.items():
        lines += [
            f"## {group}\n",
            f"| | {' | '.join(versions)} | shown by |",
            "|---" * (len(versions) + 2) + "|",
        ]
        for name in names:
            cells = [_cell(record[version].get(name), sentences) for version in versions]
            newest = next(record[version][name] for version in versions if name in record[version])
            shown = f"`{newest['by'].split('::')[-1]}`" if "by" in newest else ""
            lines.append(f"| `{name.removeprefix(f'{group}.')}` | {' | '.join(cells)} | {shown} |")
        lines.append("")
    if sentences:
        lines += ["## Refused\n", *(f"{n}. {text}" for n, text in enumerate(sentences, start=1)), ""]
    return "\n".join(lines)


def _cell(entry: dict[str, str] | None, sentences: list[str]) -> str:
    if entry is None:
        return "–"
    if entry["state"] == WORKS:
        return "✓"
    if entry["state"] == NOT_DRIVEN:
        return NOT_DRIVEN
    sentence = entry["state"].splitlines()[0]
    if sentence not in sentences:
        sentences.append(sentence)
    return f"refused ({sentences.index(sentence) + 1})"


HEAD = """\
# The official SDK against this service

Written by `make compatibility`; do not edit. That command drives every version in an environment of its own against one service, through
[tests/versions/drive.py](../tests/versions/drive.py). A tick: it was called, its result was had and was what that scene expects; the same seeds gave every version the
same losses, logprobs and samples. A dash: this version has no such method. On every run of the tests what they drive of the newest version is compared with this page.
"""
