"""Sample requests as vLLM's completions endpoint takes them, and its answers as samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinsmith.errors import InvalidInput
from tinsmith_worker.contract import SampledPiece, SampledSequence, SampleInput, SampleOutput, TopK

Json = dict[str, Any]

_EMPTY_TOKEN, _EMPTY_LOGPROB = 0, -99999.0
_IMPOSSIBLE = -9999.0  # JSON has no infinity
_NAME = "token_id:"


def check(given: SampleInput) -> None:
    """InvalidInput for what vLLM has no word for."""
    for name, is_asked in (
        ("target_prompt_logprobs", given.target_prompt_logprobs is not None),
        ("prompt_alt_tokens_k", given.prompt_alt_tokens_k),
    ):
        if is_asked:
            raise InvalidInput(f"{name} is not known to vLLM, which samples this pool: leave it out")
    if given.temperature > 2:
        raise InvalidInput(
            f"temperature is {given.temperature}: vLLM, which samples this pool, takes 2 at most"
        )


def request(given: SampleInput, model: str, end_tokens: Sequence[int]) -> Json:
    stops = end_tokens if given.stop_tokens is None else given.stop_tokens
    body: Json = {
        "model": model,
        "prompt": given.prompt.tolist(),
        "n": given.num_samples,
        # None at all is not to be had; the one is thrown away.
        "max_tokens": max(1, given.max_tokens),
        # Those of the samples are counted from it, within 64 bits with a sign; -1 would be none at all.
        "seed": given.seed % (2**63 - given.num_samples),
        "temperature": given.temperature,
        "top_k": max(0, given.top_k),
        "top_p": given.top_p,
        "ignore_eos": True,  # what ends a text is said, and nothing else does
        "stop_token_ids": list(stops),
        "stop": list(given.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": given.topk_sample_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # Nothing that one tenant had read is found by another.
        "cache_salt": given.tenant_id or "nobody",
    }
    if given.is_streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if given.prompt_logprobs or given.topk_prompt_logprobs:
        body["prompt_logprobs"] = given.topk_prompt_logprobs
    return body


def output(given: SampleInput, answer: Json) -> SampleOutput:
    """RuntimeError if vLLM did not sample to the end."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if reasons := [c["finish_reason"] for c in choices if c["finish_reason"] not in ("stop", "length")]:
        raise RuntimeError(f"it broke off ({reasons[0]}): ask again")
    details = answer["usage"].get("prompt_tokens_details") or {}
    scored = choices[0].get("prompt_logprobs")
    return SampleOutput(
        request_id=given.request_id,
        sequences=[sequence(given, choice) for choice in choices],
        prompt_logprobs=_prompt_logprobs(given, scored) if given.prompt_logprobs else None,
        topk_prompt=_topk_prompt(given, scored) if given.topk_prompt_logprobs else None,
        cache_hit_tokens=details.get("cached_tokens") or 0,
    )


class Gathering:
    """An answer that comes in parts. `answer`: what has come of it."""

    def __init__(self, given: SampleInput) -> None:
        self._given = given
        self._choices: list[Json] = [
            {
                "index": index,
                "token_ids": [],
                "logprobs": {"token_logprobs": [], "top_logprobs": []},
                "finish_reason": None,
            }
            for index in range(given.num_samples)
        ]
        self.answer: Json = {"choices": self._choices, "usage": {}}

    def take(self, part: Json) -> list[SampledPiece]:
        self.answer["usage"] = part.get("usage") or self.answer["usage"]
        return [self._piece(choice) for choice in part["choices"]]

    def _piece(self, choice: Json) -> SampledPiece:
        whole = self._choices[choice["index"]]
        start = len(whole["token_ids"])
        whole["token_ids"] += choice["token_ids"] or []
        for name, values in whole["logprobs"].items():
            values += (choice["logprobs"] or {}).get(name) or []
        whole["finish_reason"] = choice["finish_reason"]
        return SampledPiece(
            self._given.request_id,
            choice["index"],
            start,
            sequence(self._given, {**choice, "token_ids": choice["token_ids"] or []}),
            ends=choice["finish_reason"] is not None,
        )


def sequence(given: SampleInput, choice: Json) -> SampledSequence:
    count = min(len(choice["token_ids"]), given.max_tokens)
    said = choice["logprobs"] or {"token_logprobs": [], "top_logprobs": []}
    width = given.topk_sample_logprobs
    topk = None
    if width:
        tables = [
            {int(name.removeprefix(_NAME)): logprob for name, logprob in row.items()}
            for row in said["top_logprobs"][:count]
        ]
        topk = _topk(tables, width)
    return SampledSequence(
        tokens=np.array(choice["token_ids"][:count], np.int32),
        logprobs=np.array(said["token_logprobs"][:count], np.float32),
        stopped=choice["finish_reason"] == "stop" and bool(given.max_tokens),
        topk=topk,
    )


def _prompt_logprobs(
    given: SampleInput, scored: Sequence[Json | None]
) -> "np.ndarray[Any, np.dtype[np.float32]]":
    found = np.full(len(given.prompt), np.nan, np.float32)
    for place in _covered(given):
        row = scored[place]
        assert row is not None
        found[place] = row[str(given.prompt[place])]["logprob"]
    return found


def _topk_prompt(given: SampleInput, scored: Sequence[Json | None]) -> TopK:
    rows: list[Mapping[int, float]] = [{} for _ in given.prompt]
    for place in _covered(given):
        rows[place] = {int(token): one["logprob"] for token, one in (scored[place] or {}).items()}
    return _topk(rows, given.topk_prompt_logprobs)


def _covered(given: SampleInput) -> range:
    """The places of the prompt that are scored: all but the first, or the last so many."""
    length, last = len(given.prompt), given.prompt_logprobs_last_n
    return range(1 if last is None else max(1, length - last), length)


def _topk(rows: Sequence[Mapping[int, float]], width: int) -> TopK:
    table = TopK(
        np.full((len(rows), width), _EMPTY_TOKEN, np.int32),
        np.full((len(rows), width), _EMPTY_LOGPROB, np.float32),
    )
    for place, row in enumerate(rows):
        possible = [(token, logprob) for token, logprob in row.items() if logprob > _IMPOSSIBLE]
        # The token that was drawn is among them, also where it is none of the likeliest.
        best = sorted(possible, key=lambda one: -one[1])[:width]
        for column, (token, logprob) in enumerate(best):
            table.token_ids[place, column], table.logprobs[place, column] = token, logprob
    return table
