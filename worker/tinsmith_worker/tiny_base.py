"""A base model of four million parameters without a download: made on first use, the same bytes everywhere.

Its architecture is Qwen3's and its chat format ChatML, so whatever works on it works on the real ones. The
weights are random: it knows nothing until a LoRA teaches it. The tokenizer is a byte-level BPE trained on
text written by `sentences`.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 2048
HIDDEN, INTERMEDIATE, LAYERS = 256, 768, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
CONTEXT = 4096
SEED = 20250711

# Chosen by how fast an adapter of rank 32 learns 40 short answers by heart: 40 steps, with 0.02 for both more
# than twice as many. The layers write more than the embedding says, or the tied head would repeat every
# token: its chance to come again is 10 %. More of either, and float32 rounds logprobs by more than 1e-5.
EMBEDDING_SCALE, LAYERS_SCALE = 0.06, 0.3

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, _, END_OF_TURN = range(len(SPECIAL_TOKENS))  # the trainer numbers special tokens first

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# How Qwen cuts text before merging: contractions, words with the sign before them, single digits,
# punctuation, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def create(folder: Path) -> Path:
    """The folder of the tiny base, made there if it is not yet; loadable by transformers' Auto classes.

    The folder appears whole or not at all, and several processes may race to make it.
    Raises FileExistsError if something else lies there.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(made)
        made.chmod(0o755)
        made.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if not (folder / "config.json").exists():
            raise FileExistsError(f"{folder} exists and holds no model: name another folder") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    tokenizer = _tokenizer()
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(
        folder / "generation_config.json", {"eos_token_id": [END_OF_TURN, END_OF_TEXT], "pad_token_id": 0}
    )
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config())
    for file in folder.iterdir():
        with file.open("rb+") as written:
            os.fsync(written.fileno())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
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
        "eos_token_id": END_OF_TURN,
        "pad_token_id": END_OF_TEXT,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }


def _weights() -> dict[str, npt.NDArray[np.float32]]:
    """Every projection keeps the scale of its input; all that the layers write into the residual stream
    comes to LAYERS_SCALE."""
    random = np.random.Generator(np.random.Philox(SEED))

    def normal(rows: int, columns: int, scale: float) -> npt.NDArray[np.float32]:
        return random.standard_normal((rows, columns), np.float32) * np.float32(scale)

    def ones(size: int) -> npt.NDArray[np.float32]:
        return np.ones(size, np.float32)

    inner = HEADS * HEAD_DIM
    residual = LAYERS_SCALE / np.sqrt(2 * LAYERS)
    weights = {
        "model.embed_tokens.weight": normal(VOCAB_SIZE, HIDDEN, EMBEDDING_SCALE),
        "model.norm.weight": ones(HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": ones(HIDDEN),
            at + "self_attn.q_proj.weight": normal(inner, HIDDEN, HIDDEN**-0.5),
            at + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, HIDDEN**-0.5),
            at + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN, HIDDEN**-0.5),
            at + "self_attn.o_proj.weight": normal(HIDDEN, inner, residual * inner**-0.5),
            at + "self_attn.q_norm.weight": ones(HEAD_DIM),
            at + "self_attn.k_norm.weight": ones(HEAD_DIM),
            at + "post_attention_layernorm.weight": ones(HIDDEN),
            at + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN, HIDDEN**-0.5),
            at + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN, HIDDEN**-0.5),
            at + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE, residual * INTERMEDIATE**-0.5),
        }
    return weights


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(5_000), trainer)
    return tokenizer


_LISTS: dict[str, str] = {
    "the": "the the the a this that every another our their my your his her its",
    "adjective": """
        able bad big black blue bright brown calm careful cheap clean clear cold common cool correct dark
        deep different difficult dry early easy empty exact fair famous fast final fine first fresh full
        general gentle good great green happy hard heavy high honest hot huge important interesting kind
        large last late light little long loud low main modern narrow near new next nice old open ordinary
        own past perfect plain poor possible present private public quick quiet rare ready real red rich
        right round safe same sharp short simple single slow small smooth soft solid special strange strong
        sudden sweet tall thick thin tiny useful usual warm weak wet white whole wide wild wise wrong yellow
        young""",
    "noun": """
        animal answer apple army art baby bag ball bank bird boat body book bottle box boy bread bridge
        brother building bus cake car cat century chair change child church city class clock cloud coat
        coffee color company computer corner country course cup daughter day desk dinner doctor dog door
        dream edge egg energy engine evening example eye face fact family farm farmer father field fire fish
        floor flower food foot forest friend fruit game garden girl glass government grass group hand hat
        head heart history hole home horse hospital hour house idea island job journey key king kitchen lake
        lamp language law leaf lesson letter library line list machine man map market meal meeting message
        metal middle milk minute mirror model moment money month moon morning mother mountain mouth movie
        music name nature night noise north number ocean office oil orange page paper parent park part party
        path pen people person picture piece place plan planet plant plate point poem price problem question
        rain reason restaurant result rice river road rock roof room rule salt school science sea season
        seat second sentence shape ship shirt shop side sign sister size sky snow soldier son song sound
        soup south space spring square star station stone store storm story street student sugar summer sun
        surface system table teacher team telephone theater thing time tool town train tree trip truth uncle
        university village voice wall war water weather week west wheel wife wind window winter woman word
        work world writer year""",
    "verb": """
        accept add answer arrive ask become begin believe break bring build buy call carry catch change
        choose climb close collect come compare cook count cover cross cut dance decide describe draw drink
        drive eat explain fall feel fight fill find finish follow forget give grow happen hear help hide
        hold hope imagine improve join jump keep know laugh learn leave lift like listen live look love make
        mean measure meet move need notice offer open paint pass pay pick play point prepare promise pull
        push put reach read receive remember repeat return run save say see seem sell send share show sing
        sit sleep smile speak spend stand start stay stop study suggest swim take talk teach tell thank
        think throw touch travel try turn understand use visit wait walk want warn wash watch wear win wish
        wonder write""",
    "adverb": """
        again almost already also always away carefully early easily even finally here indeed just later
        maybe never now often once only perhaps quickly quietly rather really sometimes soon still suddenly
        then there today together tomorrow usually very well yesterday""",
    "link": """
        about across after against along among around at before behind below beside between beyond by for
        from in inside into like near of off on onto over since through to toward under until up upon with
        within without""",
    "clause": "and but because although if when while so before after unless until where though since",
    "person": "I you he she we they everyone somebody nobody it",
    "modal": """
        can could did does do will would should must may might was is are were has had have did not does not
        can not will not""",
    "ask": "What Who Where When Why How Which",
    "syllable": """
        ba be bo ca ce da den di do el en er fa fi ga gu ha hol in is ka ki ko la len li lo ma mer mi mo na
        ne ni nor o ol pa pe ra ri ro sa se si so sta ta te ti to tra u va ve vi wa wen xi ya za zu""",
}
_ASKING = (
    "{ask} {modal} the {noun} of {name}?",
    "{ask} {modal} {the} {adjective} {noun} {verb}?",
    "Please {verb} {the} {noun} {link} {the} {noun}.",
    "Can you {verb} {the} {adjective} {noun} for me?",
    "What is the capital of {name}?",
    "How many {noun}s are there in {name}?",
    "What is {a} {sign} {b}?",
)
_TELLING = (
    "{person} {modal} {verb} {the} {noun} {link} {the} {adjective} {noun}.",
    "The {adjective} {noun} {modal} {adverb} {verb} {link} {the} {noun}.",
    "{name} is {the} {adjective} {noun} {link} {name}.",
    "{clause} {the} {noun} {modal} {verb}, {person} {verb} {adverb}.",
    "The {noun} of {name} is {name}.",
    "There are {a} {noun}s and {b} {adjective} {noun}s {link} {name}.",
    "{a} {sign} {b} = {result}",
    "It's {adverb} {adjective}, isn't it? I don't think you've {verb}ed, and we're {verb}ing.",
)


def sentences(count: int, seed: int = SEED) -> Iterator[str]:
    """`count` made-up lines: statements, sums, questions with their answers, and chat turns."""
    random = np.random.Generator(np.random.Philox(seed))
    words = {kind: found.split() for kind, found in _LISTS.items()}

    def one(choices: "list[str] | tuple[str, ...]") -> str:
        return choices[int(random.integers(len(choices)))]

    def fill(template: str) -> str:
        a, b = int(random.integers(100)), int(random.integers(100))
        sign = one(("+", "-", "*"))
        values = {"a": a, "b": b, "sign": sign, "result": {"+": a + b, "-": a - b, "*": a * b}[sign]}
        text = template
        while "{" in text:
            kind = text[text.index("{") + 1 : text.index("}")]
            word = "".join(one(words["syllable"]) for _ in range(int(random.integers(2, 4)))).capitalize()
            value = str(values[kind]) if kind in values else word if kind == "name" else one(words[kind])
            text = text.replace(f"{{{kind}}}", value, 1)
        return text[0].upper() + text[1:]

    for _ in range(count):
        told, asked = fill(one(_TELLING)), fill(one(_ASKING))
        form = int(random.integers(4))
        if form == 0:
            yield told
        elif form == 1:
            yield f"Question: {asked}\nAnswer: {told}\n"
        elif form == 2:
            yield f"user\n{asked}\nassistant\n{told}\n"
        else:
            yield f"{told} {fill(one(_TELLING))}\n\n"
