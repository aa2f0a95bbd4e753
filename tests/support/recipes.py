"""Stand-ins for what the recipes of docs/recipes name: models and rows of data, which are fetched nowhere in tests.

A model is made twice: of its true sizes, in files that hold no numbers (a hole in place of the weights), for all
that is said before a run; and tiny with random weights, of the same architecture, for engines.
"""

import json

from tests.support.models import make_model
from tests.support.paths import ROOT
from tests.support.tokenizers import TEMPLATE, make_tokenizer

FOLDER = ROOT / "docs/recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
_QWEN3 = dict(head_dim=128, num_key_value_heads=8, vocab_size=151936)
_QWEN2 = dict(
    hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
    head_dim=128, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
_QWEN3_2B = _QWEN3 | dict(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True
)
_QWEN3_4B = _QWEN3 | dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=True
)
_QWEN3_8B = _QWEN3 | dict(
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    tie_word_embeddings=False,
)
_SMOLLM2 = dict(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    head_dim=64, vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
SIZES = {  # kind, longest text and sizes, as the models' config.json have them
    "Qwen/Qwen3-1.7B-Base": ("qwen3", 32768, _QWEN3_2B),
    "Qwen/Qwen3-1.7B": ("qwen3", 40960, _QWEN3_2B),
    "Qwen/Qwen3-4B-Base": ("qwen3", 32768, _QWEN3_4B),
    "Qwen/Qwen3-4B": ("qwen3", 40960, _QWEN3_4B),
    "Qwen/Qwen3-8B": ("qwen3", 40960, _QWEN3_8B),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 131072, _QWEN2),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 32768, _QWEN2),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 8192, _SMOLLM2),
}
_LOCAL = {"student": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what a recipe's page has the reader make
_CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
_ROWS = {  # columns as those data sets have them
    "openai/gsm8k": {"question": "1 + {}?", "answer": "1 and {0} are more.\n#### {0}"},
    "gsm8k/train.jsonl": {"question": "1 + {}?", "answer": "1 and {0} are more.\n#### {0}"},
    "open-r1/DAPO-Math-17k-Processed": {"prompt": "2 + {}?", "solution": "{}"},
    "HuggingFaceH4/MATH-500": {"problem": "3 + {}?", "answer": "{}"},
    "HuggingFaceH4/aime_2024": {"problem": "4 + {}?", "answer": "{}"},
    "math-ai/amc23": {"question": "5 + {}?", "answer": "{}"},
    "math-ai/minervamath": {"question": "6 + {}?", "answer": "{}"},
}


def _tokenizer():
    thinks = "{% if enable_thinking is defined and not enable_thinking %}-{% endif %}"
    return make_tokenizer(chat_template=TEMPLATE + thinks)


def parameters_of(name):
    """Weights of a model, but for its norms."""
    _, _, s = SIZES[name]
    heads = 2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"]
    layer = s["hidden_size"] * (s["head_dim"] * heads + 3 * s["intermediate_size"])
    rows = s["vocab_size"] * (1 if s["tie_word_embeddings"] else 2)
    return s["num_hidden_layers"] * layer + rows * s["hidden_size"]


def kept_bytes(name):
    """Of one token in a KV cache, in bfloat16."""
    _, _, s = SIZES[name]
    return 2 * 2 * s["num_hidden_layers"] * s["num_key_value_heads"] * s["head_dim"]


def _write_sized(folder, name):
    kind, longest, sizes = SIZES[name]
    _tokenizer().save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = (
        {"architectures": [_CLASSES[kind]], "model_type": kind, "max_position_embeddings": longest} | sizes | ids
    )
    (folder / "config.json").write_text(json.dumps(config))
    count = parameters_of(name)
    header = json.dumps({"all": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * count)  # a hole: nothing is written


def _write_tiny(folder, name, seed):
    tokenizer = _tokenizer()
    make_model(folder, SIZES[name][0], seed=seed, vocabulary=len(tokenizer))
    tokenizer.save_pretrained(folder)


def _write_rows(file, path, count):
    row = _ROWS[path]
    lines = (json.dumps({k: text.format(i) for k, text in row.items()}) for i in range(count))
    file.write_text("".join(f"{line}\n" for line in lines))


def stand_ins(config, folder, tiny=False, rows=40):
    """Overrides that put local stand-ins in the place of the models and data sets that a recipe names."""
    overrides, made = [], {}
    for section in ("student", "teacher"):
        model = getattr(config, section)
        if model is None:
            continue
        if model.path not in made:
            made[model.path] = folder / f"model-{len(made)}"
            made[model.path].mkdir()
            name = _LOCAL.get(model.path, model.path)
            _write_tiny(made[model.path], name, len(made)) if tiny else _write_sized(made[model.path], name)
        overrides.append(f"{section}.path={made[model.path]}")
    data = {"data": config.data, "evaluation.data": config.evaluation.data}
    data |= {
        f"evaluation.sets.{name}.data": config.evaluation.parts()[name].data for name in config.evaluation.sets
    }
    for number, (section, part) in enumerate(data.items()):
        if part is None or part.path.startswith("environment:"):
            continue
        file = folder / f"data-{number}.jsonl"
        _write_rows(file, part.path, rows if section == "data" else 2)
        overrides.append(f"{section}.path={file}")
    return overrides
