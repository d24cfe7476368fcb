"""The losses a run can be trained with: their inputs, settings and defaults.

Every loss is summed over tokens and datums. With lp = log p(target), q = input `logprobs`,
A = `advantages` and r = exp(lp - q), per token:

cross_entropy        -w * lp
importance_sampling  -r * A
ppo                  -min(r * A, clamp(r, low, high) * A)
cispo                -sg(clamp(r, low, high)) * lp * A
dro                  -(lp * A - beta / 2 * (lp - q)^2)
gspo                 s = exp(mean over masked tokens of (sg(lp) - q) + lp - sg(lp)), then ppo with s for r
stable_reinforce     -sg(min(r, 1)) * A * lp + kl_coeff / 2 * (lp - q)^2, on sampled tokens only

cross_entropy to gspo follow the public documentation of the Tinker API; where it names no default,
the one below is ours (gspo: Zheng et al. 2025, "Group Sequence Policy Optimization", section 5.1).
stable_reinforce is this project's own definition (docs/losses.md): the public one is not published.
"""

from dataclasses import dataclass, field

REINFORCE_MASK = "sampled_mask"


@dataclass(frozen=True)
class Loss:
    """inputs: per-token tensors that must be given. settings: name -> default.
    token_settings: settings that may also be given per token, as an input of the same name."""

    inputs: tuple[str, ...]
    settings: dict[str, float] = field(default_factory=dict)
    token_settings: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)


_CLIP = ("clip_low_threshold", "clip_high_threshold")
_POLICY = ("logprobs", "advantages")

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(("weights",)),
    "importance_sampling": Loss(_POLICY),
    "ppo": Loss(_POLICY, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}, _CLIP),
    "cispo": Loss(
        _POLICY,
        {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        _CLIP,
        {"clip_low": "clip_low_threshold", "clip_high": "clip_high_threshold"},
    ),
    "dro": Loss(_POLICY, {"beta": 0.05}),
    "gspo": Loss(
        (*_POLICY, "sequence_ratio_mask"),
        {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
        _CLIP,
    ),
    # `logprobs` and `sampled_mask` are filled in by the server from its own record of the samples.
    "stable_reinforce": Loss((*_POLICY, REINFORCE_MASK), {"kl_coeff": 0.0}),
}
