"""A trained adapter as files on this machine."""

import json
import os
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import httpx

from tinsmith.errors import InvalidInput, TinsmithError
from tinsmith.rest_client import RestClient

if TYPE_CHECKING:
    from tinsmith.training_client import TrainingClient

# What is saved on the way lives so long: the shortest a service takes.
_PASSING_SECONDS = 3600


def export(
    training: "TrainingClient",
    folder: Path,
    format: Literal["peft", "merged"] = "peft",
    *,
    base: str | None = None,
    dtype: str = "auto",
) -> Path:
    """`folder`, with the adapter as PEFT has it, or, of a run that trains all weights, with config.json and
    the weights. For "merged": with the whole model, `base` (a hub id or a folder with the same base model on
    this machine; default: the run's base_model) plus the adapter, in `dtype`; transformers and peft must be
    installed here."""
    if format not in ("peft", "merged"):
        raise InvalidInput(f"format is 'peft' or 'merged', not {format!r}")
    name = f"export-{time.time_ns():x}"
    path = training.save_weights_external(name, ttl_seconds=_PASSING_SECONDS).result().path
    records = RestClient(training._connection)
    if format == "peft":
        return download(records, path, folder)
    with tempfile.TemporaryDirectory() as adapter:
        download(records, path, Path(adapter))
        return merge(Path(adapter), base or str(training.get_info().model_data.model_name), folder, dtype)


def download(records: RestClient, tinker_path: str, folder: Path) -> Path:
    """The files of external weights, each whole or not at all."""
    urls = records.get_external_weights_urls(tinker_path).result().urls
    folder.mkdir(parents=True, exist_ok=True)
    with httpx.Client(timeout=60) as http:
        for name, url in urls.items():
            # The service names the files; it does not say where on this machine.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise TinsmithError(f"the service calls a file {name!r}, outside of the folder")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            written = target.with_name(f".{target.name}.part")
            with http.stream("GET", url) as response, written.open("wb") as out:
                if response.status_code != 200:
                    raise TinsmithError(f"{name} cannot be fetched: {response.status_code}")
                for part in response.iter_bytes(1 << 20):
                    out.write(part)
            os.replace(written, target)
    return folder


def merge(adapter: Path, base: str, folder: Path, dtype: str = "auto") -> Path:
    """The base model with the adapter in its weights, and its tokenizer, as transformers saves them. Where
    the adapter changes an unembedding that is tied to the embedding, they are two from then on."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (adapter / "config.json").exists():  # it is a whole model already
        AutoModelForCausalLM.from_pretrained(adapter, dtype=dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return folder
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    head = model.get_output_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is head]
    trained = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    if model.config.tie_word_embeddings and name in trained:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
