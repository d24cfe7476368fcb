"""What a model can do, task by task: asked about held-out examples, greedily and sampled at temperature 1.

python -m tinsmith_worker.tiny_base.abilities [FOLDER] [--items 200]
"""

import argparse
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tinsmith_worker.tiny_base import FOLDER, tasks, text
from tinsmith_worker.tiny_base.tasks import TASKS, Example

MAX_TOKENS = 48


def right(judged: str, expected: str, said: str) -> bool:
    said = said.strip()
    if judged == "number":
        return re.findall(r"-?\d+", said)[-1:] == [expected]
    if judged == "contains":
        return re.search(rf"(?<!\w){re.escape(expected.lower())}(?!\w)", said.lower()) is not None
    if judged == "one of":
        return said in expected.split()
    return said == expected


def questions(name: str, items: int, seed: str) -> list[tuple[str, str, str]]:
    """(prompt, how it is judged, what is right). A tool task asks for the call, then for the answer to it."""
    r = Random(f"{seed} {name}")
    judged = TASKS[name].judged
    found: list[tuple[str, str, str]] = []
    while len(found) < items:
        made = tasks.held_out(name, r)
        if judged == "tool":
            if len(made.turns) == 4:
                found.append(_question(made, 1, "equal", made.turns[1][1]))
                found.append(_question(made, 3, "contains", made.right))
        else:
            found.append(_question(made, -1, judged, made.right))
    return found[:items]


def _question(made: Example, at: int, judged: str, expected: str) -> tuple[str, str, str]:
    return text.chat(made.turns[:at], made.tools), judged, expected


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    temperature: float,
    most_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> list[str]:
    """One answer each, all at once."""
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    encoded = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    width = max(map(len, encoded))
    pad, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    padded = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
    said = model.generate(
        input_ids=padded,
        attention_mask=mask,
        max_new_tokens=most_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature else None,
        pad_token_id=pad,
        eos_token_id=[end, pad],
    )
    return [
        tokenizer.decode([i for i in ids if i not in (pad, end)], skip_special_tokens=False)
        for ids in said[:, width:].tolist()
    ]


def measure(
    model: Any, tokenizer: Tokenizer, items: int, seed: str = "abilities"
) -> dict[str, dict[str, float]]:
    """For every judged task the share of right answers, greedy and at temperature 1."""
    found: dict[str, dict[str, float]] = {}
    for name, task in TASKS.items():
        if not task.judged:
            continue
        asked = questions(name, items, seed)
        found[name] = {}
        for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            said = answers(model, tokenizer, [prompt for prompt, _, _ in asked], temperature=temperature)
            good = [
                right(judged, expected, one) for (_, judged, expected), one in zip(asked, said, strict=True)
            ]
            found[name][way] = sum(good) / len(good)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    rows = [f"| {name} | {row['greedy']:.0%} | {row['sampled']:.0%} |" for name, row in found.items()]
    return "\n".join(("| task | greedy | temperature 1 |", "|---|---|---|", *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(chosen.folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(chosen.folder, dtype=torch.float32).eval()
    found = measure(model, tokenizer, chosen.items)
    print(json.dumps(found) if chosen.json else table(found))


if __name__ == "__main__":
    main()
