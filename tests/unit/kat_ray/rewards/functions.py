"""Reward functions in files, and what rewards answers by them."""

from contextlib import contextmanager

from kat_ray.rewards.limits import GradingLimits
from kat_ray.rewards.scoring import Answer, RewardRules, RewardScorer
from kat_ray.rewards.task import Task

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
TASKS = {
    "text": Task("1+1?", "1+1?", "2", {"answer": "2", "level": 7}, "d.jsonl"),
    "chat": Task(CHAT, "<s>2+2?</s>", ["4", "four"], {"data_source": "sums", "extra_info": {"i": 3}}, "d.jsonl"),
}
GOOD = "def score(completions, **kw): return [1.0]\n"


@contextmanager
def scorer(functions, tasks=TASKS, **rules):
    limits = {"processes": 1, "seconds": 30.0, "total_seconds": 120.0, "fields": "reward."}
    limits |= {name: rules.pop(name) for name in (*limits, "memory_gib", "calls_at_once") if name in rules}
    made = RewardScorer(RewardRules(functions, limits=GradingLimits(**limits), **rules), tasks)
    try:
        yield made
    finally:
        made.close()


def ids_of(text):
    return [7] * len(text)


def answers(*texts, prompt="text", **fields):
    return {i: Answer(prompt, text, (5, 6), **fields) for i, text in enumerate(texts)}


def values(scored):
    return [reward.value for reward in scored.rewards.values()]
