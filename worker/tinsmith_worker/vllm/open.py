"""What vLLM samples a base model with, opened."""

from typing import Any

from tinsmith_worker.contract import Engine, ModelFacts
from tinsmith_worker.null_engine import NullEngine
from tinsmith_worker.vllm.sampler import VllmSampler
from tinsmith_worker.vllm.server import VllmServer


def open_vllm(path: str, command: str) -> tuple[Engine, VllmSampler]:
    """An engine that trains nothing, and only says what the base model is, and the sampler. `path`: a folder
    or a hub id; `command`: see `VllmServer`. OSError or ValueError if there is no model, or vLLM ends."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    facts = ModelFacts(
        vocab_size=int(text.vocab_size),
        max_context_length=int(text.max_position_embeddings),
        architecture=str((config.architectures or [type(config).__name__])[0]),
        tokenizer=path,
    )
    engine = NullEngine()
    engine.facts = facts
    server = VllmServer(command, path, max_context_length=facts.max_context_length)
    return engine, VllmSampler(server, _end_tokens(path, config))


def _end_tokens(path: str, config: Any) -> list[int]:
    """Those that end a text unless a request says otherwise, as `Base.end_tokens` finds them."""
    from transformers import GenerationConfig

    try:
        given = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # it has none of its own
        given = GenerationConfig.from_model_config(config).eos_token_id
    if given is None:
        return []
    return [given] if isinstance(given, int) else list(given)
