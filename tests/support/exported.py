"""Runs with a checkpoint, made by hand, for what exports them."""

import json

from kat_ray.config import Config
from kat_ray.config.load import config_yaml
from tests.support.models import make_model
from tests.support.tokenizers import make_tokenizer

STEP = 20


def make_run(root, *, template=None, teacher_template=None, data=None, step=STEP, **student):
    """A run below `root`: a student whose tokenizer files no library has written again, and a checkpoint of other
    weights with files that one has; returns its directory.
    """
    tokenizer = make_tokenizer(chat_template=template)
    make_model(root / "student", vocabulary=len(tokenizer), **student)
    tokenizer.save_pretrained(root / "student")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = root / "student" / name  # as a person may have written it: its bytes are not those of a library
        content = json.loads(file.read_text())
        content |= {"tokenizer_class": "PreTrainedTokenizerFast"} if "tokenizer_class" in content else {}
        file.write_text(json.dumps(content, separators=(" , ", " : ")))
    make_tokenizer(chat_template=teacher_template).save_pretrained(root / "teacher")
    (root / "student" / "LICENSE").write_text("as you like\n")
    run = root / "run"
    checkpoint = run / "checkpoints" / f"step-{step}"
    make_model(checkpoint, seed=7, vocabulary=len(tokenizer), **student)
    tokenizer.save_pretrained(checkpoint)
    (checkpoint / "special_tokens_map.json").write_text("{}")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true}')
    (checkpoint / "training").mkdir()
    (checkpoint / "training" / "state.json").write_text("{}")
    write_records(root, run, data or {})
    return run


def write_records(root, run, data):
    config = Config.model_validate(
        {
            "run": {"name": "mine", "dir": str(root)}, "student": {"path": str(root / "student")},
            "teacher": {"path": str(root / "teacher")},
            "data": {"path": "openai/gsm8k", "name": "main", "prompt_column": "question", **data},
            "evaluation": {"data": {"path": str(root / "held.jsonl")}},
        }
    )  # fmt: skip
    (run / "config.yaml").write_text(config_yaml(config))
    (run / "evaluations.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": step, "avg_at_k": sum(right) / 16, "pass_at_k": 0.75, "k": 4, "problems": 4,
                    "mean_length": 31.5, "truncated_share": 0.25, "right": right,
                }
            )
            + "\n"
            for step, right in ((0, [0, 1, 0, 1]), (10, [1, 1, 1, 1]), (STEP, [4, 3, 0, 1]))
        )
    )  # fmt: skip
    lines = (
        {"step": step, "learner/loss": 1 / step, "learner/tokens": 90.0, "rollout/generated_tokens": 100.0,
         "kl/kept_mean": 1 / step}
        for step in range(1, STEP + 3)
    )  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
