import numpy as np

from tinsmith_worker.sampler.stops import StopRule


class Bytes:
    """Every token is one byte of UTF-8: the hardest tokenizer for whole characters."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return bytes(token_ids).decode(errors="replace")


def ended_at(rule: StopRule, text: bytes) -> int | None:
    """How many tokens had been sampled when the rule said stop."""
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    return next((n for n in range(1, len(tokens) + 1) if rule.ends(tokens[:n])), None)


def strings(*given: str) -> StopRule:
    return StopRule(frozenset(), given, Bytes())


def test_a_stop_token_ends_the_sequence_and_nothing_else_does() -> None:
    assert ended_at(StopRule(frozenset([ord("c")])), b"abcabc") == 3
    assert ended_at(StopRule(frozenset()), b"abc") is None


def test_a_stop_string_ends_at_the_token_that_completes_it() -> None:
    assert ended_at(strings("Answer:"), b"no. Ans! Answer: 4") == len(b"no. Ans! Answer:")


def test_the_first_of_several_stop_strings_counts() -> None:
    assert ended_at(strings("zz", "b", "abc"), b"abc") == 2


def test_a_character_of_many_bytes_is_found_when_its_last_byte_comes() -> None:
    text = "schön 🙂 你好".encode()
    assert ended_at(strings("ö"), text) == len("schö".encode())
    assert ended_at(strings("🙂"), text) == len("schön 🙂".encode())
    assert ended_at(strings("你好"), text) == len(text)


def test_a_stop_string_is_found_after_long_text() -> None:
    text = ("ü" * 500).encode() + b"###"
    assert ended_at(strings("###"), text) == len(text)
