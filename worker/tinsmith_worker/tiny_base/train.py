"""Trains the tiny base from nothing and writes all that is shipped of it: `make base`.

Muon for the layers' matrices, AdamW for the embedding and the norms; rows of documents one after another;
warm-up, then down along a half cosine. On a GPU in bfloat16. On a CPU, where Muon's bfloat16 products take
minutes, all is AdamW's: enough to see that the loss falls.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinsmith_worker.tiny_base import CONTEXT, abilities, tasks, text, tokenizer

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": tokenizer.VOCAB_SIZE,
    "hidden_size": 320,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": None,
}
MUON_RATE, ADAMW_RATE, WEIGHT_DECAY = 4e-3, 3e-3, 0.1
ROW = 1024
EVALUATIONS, EVALUATED = 20, 64


class Blocks(Dataset[torch.Tensor]):
    """Batch `n` is block `n` of the seed, whichever process makes it."""

    def __init__(self, tokenizer_file: Path, seed: str, steps: int, rows: int) -> None:
        self.tokenizer_file, self.seed, self.steps, self.rows = tokenizer_file, seed, steps, rows
        self.tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> torch.Tensor:
        self.tokenizer = self.tokenizer or Tokenizer.from_file(str(self.tokenizer_file))
        block = text.block(self.tokenizer, f"{self.seed} block {step}", self.rows, ROW)
        return torch.from_numpy(block.astype(np.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/base"))
    parser.add_argument("--tokens", type=float, default=235e6)
    parser.add_argument("--rows", type=int, default=128, help=f"rows of {ROW} tokens in a batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--items", type=int, default=200, help="questions a task to measure abilities with")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    started = time.perf_counter()
    words = tokenizer.train(f"{chosen.seed} tokenizer")
    write_folder(chosen.out, words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(chosen.seed)
    model: Any = Qwen3ForCausalLM(Qwen3Config(**CONFIG, **token_ids(words)))
    model.to(device)
    steps = max(1, int(chosen.tokens / (chosen.rows * ROW)))
    blocks = Blocks(chosen.out / "tokenizer.json", str(chosen.seed), steps, chosen.rows)
    history = train(model, blocks, words, chosen.processes)
    save(model, chosen.out)

    model = Qwen3ForCausalLM.from_pretrained(chosen.out, dtype=torch.float32).eval()
    model.to(device)
    found = abilities.measure(model, words, chosen.items)
    facts = {
        "seed": chosen.seed,
        "first_block": hashlib.sha256(blocks[0].numpy().astype("<u2").tobytes()).hexdigest(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * chosen.rows * ROW,
        "seconds": round(time.perf_counter() - started, 1),
        "abilities": found,
    }
    with (chosen.out / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in (*history, facts))
    draw(history, chosen.out / "curves.png")
    print(abilities.table(found))
    print({name: value for name, value in facts.items() if name != "abilities"})


def train(model: Any, blocks: Blocks, words: Tokenizer, processes: int) -> list[dict[str, float]]:
    device, steps = model.device, len(blocks)
    on_gpu = device.type == "cuda"
    if on_gpu:
        for layer in model.model.layers:
            layer.compile()
    optimizers = make_optimizers(model, on_gpu)
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate(steps)) for optimizer in optimizers
    ]
    loader = DataLoader(
        blocks,
        batch_size=None,
        num_workers=processes,
        pin_memory=on_gpu,
        prefetch_factor=4 if processes else None,
    )
    held_out = evaluation(words)
    history: list[dict[str, float]] = []
    every = max(1, steps // EVALUATIONS)
    losses: list[torch.Tensor] = []
    started = last = time.perf_counter()
    for step, batch in enumerate(loader):
        tokens = batch.to(device, torch.int64, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = token_losses(model, tokens).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedule, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * tokens.numel(),
                "loss": float(torch.stack(losses).mean()),
                "tokens_per_second": len(losses) * tokens.numel() / (time.perf_counter() - last),
                "seconds": time.perf_counter() - started,
                **evaluate(model, held_out, on_gpu),
            }
            history.append(row)
            losses, last = [], time.perf_counter()
            print({name: round(value, 4) for name, value in row.items() if "/" not in name}, flush=True)
    return history


def make_optimizers(model: Any, on_gpu: bool) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "fused": on_gpu}
    return [
        torch.optim.Muon(matrices, MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        if on_gpu
        else torch.optim.AdamW(matrices, ADAMW_RATE, weight_decay=WEIGHT_DECAY, **adamw),
        torch.optim.AdamW(others, ADAMW_RATE, weight_decay=0.0, **adamw),
    ]


def share_of_rate(steps: int) -> Callable[[int], float]:
    """Up over the first fiftieth, then down along a half cosine to one fiftieth."""
    warm_up = max(1, steps // 50)
    return lambda step: (
        min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )


def token_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token but the first: [rows, tokens - 1]. No mask: causal attention over the whole row."""
    hidden = model.model(
        input_ids=tokens, attention_mask={"full_attention": None}, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[:, :-1])
    # Whether an answer begins with an empty thought is the prompt's to say: it never learns to begin one.
    targets = tokens[:, 1:]
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=tokenizer.THINK, reduction="none"
    )
    return losses.view(targets.shape)


Held = dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]


def evaluation(words: Tokenizer) -> Held:
    """Held-out documents of every task, and which of their tokens count: the last answer's, or all."""
    found: Held = {}
    for name in tasks.TASKS:
        r = Random(f"evaluation {name}")
        rows, counted = np.zeros((EVALUATED, ROW // 2), np.int64), np.zeros((EVALUATED, ROW // 2), bool)
        for row in range(EVALUATED):
            made = tasks.held_out(name, r)
            given = "" if made.turns[0][0] == "" else text.chat(made.turns[:-1], made.tools)
            whole = made.turns[0][1] if not given else f"{given}{made.turns[-1][1]}<|im_end|>"
            ids = words.encode(whole, add_special_tokens=False).ids[: ROW // 2]
            rows[row, : len(ids)] = ids
            counted[row, len(words.encode(given, add_special_tokens=False).ids) : len(ids)] = True
        longest = int(np.flatnonzero(counted.any(axis=0))[-1]) + 1
        found[name] = rows[:, :longest], counted[:, :longest]
    return found


@torch.no_grad()
def evaluate(model: Any, held_out: Held, on_gpu: bool) -> dict[str, float]:
    found, device = {}, model.device.type
    for name, (rows, counted) in held_out.items():
        tokens, mask = (
            torch.from_numpy(rows).to(model.device),
            torch.from_numpy(counted[:, 1:]).to(model.device),
        )
        # Uncompiled: every task has another length.
        with torch.compiler.set_stance("force_eager"), torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            found[f"held_out/{name}"] = float(token_losses(model, tokens)[mask].mean())
    return {"held_out": sum(found.values()) / len(found), **found}


def token_ids(words: Tokenizer) -> dict[str, Any]:
    return {
        "eos_token_id": words.token_to_id("<|im_end|>"),
        "pad_token_id": words.token_to_id("<|endoftext|>"),
    }


def write_folder(folder: Path, words: Tokenizer) -> None:
    """All but the weights."""
    ids = token_ids(words)
    words.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(tokenizer.CHAT_TEMPLATE)
    write_json(folder / "tokenizer_config.json", tokenizer.config())
    write_json(folder / "config.json", CONFIG | ids)
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [ids["eos_token_id"], ids["pad_token_id"]], "pad_token_id": ids["pad_token_id"]},
    )


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def save(model: Any, folder: Path) -> None:
    """The tied head is not written twice."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def draw(history: list[dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in history[0] if name.startswith("held_out/")]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    millions = [row["tokens"] / 1e6 for row in history]
    for at, name in enumerate(names):
        values = [row[name] for row in history]
        style = ("-", "--", ":")[at // 10]
        axes.plot(millions, values, style, linewidth=1, label=name.removeprefix("held_out/"))
    axes.plot(millions, [row["loss"] for row in history], color="black", linewidth=2, label="training")
    axes.set(xlabel="million tokens", ylabel="loss per token (held out: per answer token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
