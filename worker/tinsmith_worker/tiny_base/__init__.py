"""The built-in base model, eight million parameters of the Qwen3 architecture, and how it was made.

`model/` is shipped and loads with transformers' Auto classes; its README.md is the model card. `tasks` and
`words` hold what it was taught, `text` and `tokenizer` make tokens of it, `train` trains it (`make base`),
and `abilities` measures what it can do.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "model"
CONTEXT = 4096  # served; trained on the first quarter of it
