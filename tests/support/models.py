"""Tiny real models."""

import json

import torch

from tests.support.chunks import random_rollouts


def make_model(path, kind="qwen3", seed=0, vocabulary=200, tied=True, **changes):
    """A random model of two layers, saved to `path`; big weights, so that its distributions differ."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.1,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ) | changes  # fmt: skip
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **sizes))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.eval().save_pretrained(path)
    return model


def write_job_files(root):
    """A random student and a random teacher with the demo's tokenizer, and prompts that both can read; `root`."""
    from kat_ray.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    for name, seed in (("student", 1), ("teacher", 2)):
        make_model(root / name, seed=seed, vocabulary=len(tokenizer))
        tokenizer.save_pretrained(root / name)
    rows = [
        {"prompt": " ".join(str(n % 150) for n in prompt) + "\n", "answer": "7"}
        for prompt, _ in random_rollouts(40).values()
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root
