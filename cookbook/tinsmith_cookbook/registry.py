"""Every recipe, how it is run at its short setting, and what must come out.

A row is added here with the recipe: `make cookbook` runs all of them and compares. The bounds of what is
learnt by sampling lie outside what seeds 0, 1 and 2 gave (docs/cookbook-rl.json), so that others pass too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Bounds = Mapping[str, tuple[float, float]]
INFINITE = math.inf


@dataclass(frozen=True)
class Recipe:
    """`module` under recipes/, run with `arguments` and --short. `outcome`: numbers of its result.json and
    between what they must lie. has_own_service: it is not given the shared one, and starts its own."""

    name: str
    title: str
    module: str
    outcome: Bounds
    arguments: tuple[str, ...] = ()
    has_own_service: bool = False

    def misses(self, result: Mapping[str, Any]) -> list[str]:
        """Sentences; none if all came out as it must."""
        return [
            f"{name} is {result.get(name)}, not between {low:g} and {high:g}"
            for name, (low, high) in self.outcome.items()
            if not (isinstance(result.get(name), int | float) and low <= result[name] <= high)
        ]


LN2 = math.log(2)

RECIPES = [
    Recipe("hello", "One sentence, learnt", "hello", {"right": (1, 1), "loss_last": (0, 0.5)}),
    Recipe("sft", "Supervised fine-tuning", "sft", {"exact_before": (0, 0.1), "exact_after": (0.6, 1)}),
    Recipe(
        "sft-packed",
        "The same, several examples a sequence",
        "sft",
        {"exact_after": (0.6, 1)},
        ("--packing", "--sequence-len", "256", "--batch", "4"),
    ),
    Recipe(
        "sweep",
        "Learning rate × rank, 18 runs at once",
        "sweep",
        {"grid_steps_between_ranks": (0, 1), "best_rate": (3e-4, 1e-2)},
    ),
    Recipe(
        "dpo",
        "Preferences: DPO",
        "dpo",
        {"loss_first": (LN2 - 1e-6, LN2 + 1e-6), "held_out_accuracy": (0.9, 1)},
    ),
    Recipe(
        "kto",
        "Preferences: KTO",
        "dpo",
        {"loss_first": (0.5 - 1e-6, 0.5 + 1e-6), "held_out_accuracy": (0.9, 1)},
        ("--loss", "kto"),
    ),
    Recipe("orpo", "Preferences: ORPO", "dpo", {"held_out_accuracy": (0.9, 1)}, ("--loss", "orpo")),
    Recipe(
        "tenants",
        "Many tenants at once, each with the bits it has alone",
        "tenants",
        {"tenants_with_the_same_bits": (8, 8), "times_as_fast": (1, INFINITE)},
        has_own_service=True,
    ),
    Recipe(
        "export",
        "An adapter taken home: PEFT and merged, loaded in transformers",
        "export",
        {
            "peft_difference": (0, 1e-4),
            "merged_difference": (0, 1e-4),
            "untrained_difference": (0.1, INFINITE),
        },
    ),
    Recipe(
        "rl",
        "Reinforcement learning with verifiable rewards: GRPO on sums",
        "rl",
        {"accuracy_before": (0, 0.75), "accuracy_after": (0.85, 1)},
    ),
    Recipe(
        "rl-losses",
        "Every loss, and samples some steps old",
        "rl_losses",
        {"ways": (9, 9), "smallest_gain": (0.1, 1)},
    ),
    Recipe(
        "rlhf",
        "RLHF: supervised, a reward model, reinforcement learning",
        "rlhf",
        {"agreement_after": (0.7, 1), "win_rate": (0.6, 1)},
    ),
    Recipe(
        "distill",
        "Distillation on the student's own samples",
        "distill",
        {"student_before": (0, 0.75), "student_after": (0.85, 1)},
    ),
    Recipe(
        "distill-prompt",
        "A prompt distilled into the weights",
        "distill",
        {"student_before": (0, 0.1), "student_after": (0.35, 1)},
        ("--method", "off", "--teacher", "prompt"),
    ),
    Recipe(
        "distill-sdft",
        "A text distilled into the weights: the teacher is the model that has read it",
        "distill",
        {"student_before": (0, 0.2), "student_after": (0.4, 1)},
        ("--method", "topk", "--teacher", "shown", "--steps", "24"),
    ),
    Recipe("self-play", "Tic-tac-toe against itself", "self_play", {"gain_against_random": (0.05, 1)}),
    Recipe(
        "tool-use",
        "A calculator, called when it helps",
        "tool_use",
        {"reward_before": (0, 0.8), "reward_after": (0.85, 1)},
    ),
    Recipe("rubric", "A rubric as the reward, and win rates", "rubric", {"win_rate_by_rubric": (0.6, 1)}),
    Recipe(
        "synthetic",
        "Questions and answers made from documents, checked",
        "synthetic",
        {"right_of_kept": (0.85, 1), "exam_before": (0, 0.15), "exam_after": (0.4, 1)},
    ),
    Recipe(
        "evaluate",
        "Evaluation of a base and an adapter",
        "evaluate",
        {"number_only_trained": (0.9, 1), "sums_trained": (0.85, 1)},
    ),
]
