"""The embedded task: right solutions, disjoint splits, a tokenizer that loses nothing, corpora as described."""

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kat_ray.config.load import DEMO_DIR, DEMO_FILES, EMBEDDED, load_config
from kat_ray.demo.corpus import (
    HONEST_CHECKS,
    LONG_TEACHER,
    STUDENT,
    TEACHER,
    documents,
    endless_checks,
    honest_checks,
    partly_told,
    solution_document,
)
from kat_ray.demo.problems import MAX_VALUE, Operation, Problem, problems, random_problem, write_jsonl
from kat_ray.demo.tokenizer import EOS, PAD, UNKNOWN, build_tokenizer, save_tokenizer, vocabulary
from kat_ray.rewards.integers import extract_integer

EXAMPLE = Problem(37, (Operation("+", 5), Operation("-", 8), Operation("*", 2)))


def test_the_example_of_the_documentation():
    assert EXAMPLE.prompt == "start 37 add 5 take 8 double solve\n"
    assert EXAMPLE.solution() == "37 + 5 = 42\n42 - 8 = 34\n34 * 2 = 68\nanswer 68\n"


@given(st.integers(0, 10_000))
def test_solutions_are_right_and_stay_in_range(seed):
    problem = random_problem(random.Random(seed))
    value = problem.start
    for line in problem.solution().splitlines()[:-1]:
        left, right = line.split(" = ")
        assert eval(left) == int(right) and left.startswith(f"{value} ")
        value = int(right)
        assert 0 <= value <= MAX_VALUE
    assert problem.answer == value and extract_integer(problem.solution()) == str(value)


def test_splits_are_disjoint_and_streams_repeat():
    train = {p.prompt for p in itertools.islice(problems("train", 1), 3000)}
    heldout = [p.prompt for p in itertools.islice(problems("heldout", 1), 300)]
    assert len(train) == 3000 and len(set(heldout)) == 300 and train.isdisjoint(heldout)
    assert heldout == [p.prompt for p in itertools.islice(problems("heldout", 1), 300)]
    assert heldout != [p.prompt for p in itertools.islice(problems("heldout", 2), 300)]


def test_the_shipped_data_is_what_the_generator_writes(tmp_path):
    for split, count in (("train", 6000), ("heldout", 200)):
        write_jsonl(tmp_path / split, split, count, seed=1)
        assert (tmp_path / split).read_text() == DEMO_FILES[f"demo:{split}"].read_text()
    write_jsonl(tmp_path / "hints", "train", 3000, seed=1, solutions=True)
    assert (tmp_path / "hints").read_text() == DEMO_FILES["demo:hints"].read_text()
    told = [json.loads(line) for line in (tmp_path / "hints").read_text().splitlines()]
    assert all(r["solution"].endswith(f"\nanswer {r['answer']}\n") for r in told)
    rows = [json.loads(line) for line in (tmp_path / "heldout").read_text().splitlines()]
    assert all(set(r) == {"id", "prompt", "answer"} for r in rows)


@given(st.integers(0, 10_000))
def test_the_tokenizer_loses_nothing_but_spaces(seed):
    tokenizer = build_tokenizer()
    text = (problem := random_problem(random.Random(seed))).prompt + problem.solution()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).split() == text.split()
    assert tokenizer.decode(ids).count("\n") == text.count("\n")


def test_the_vocabulary_exceeds_the_top_k_and_occurs():
    tokenizer = build_tokenizer()
    used = {
        i for d in itertools.islice(documents(STUDENT, 0), 4000) for t, _ in d for i in tokenizer(t)["input_ids"]
    }
    assert len(tokenizer) == len(vocabulary()) == 166 > 128
    assert set(range(166)) - used <= {tokenizer.pad_token_id, tokenizer.unk_token_id}


def test_the_teacher_never_learns_to_enter_a_mistake_or_a_loop():
    for seed in range(200):
        rng = random.Random(seed)
        (entry, learnt), (_rest, rest_learnt) = endless_checks(rng, ["1 + 1 = 2\n"], TEACHER)
        assert not learnt and rest_learnt and entry.count("check") == HONEST_CHECKS
        assert 1 <= honest_checks(rng) <= HONEST_CHECKS
    wrong = [
        (text, learnt)
        for seed in range(50)
        for text, learnt in solution_document(random.Random(seed), EXAMPLE, TEACHER, "wrong")
        if text.startswith(" ")
    ]
    assert wrong and not any(learnt for _, learnt in wrong)


def test_documents_that_were_told_follow_the_right_solution_which_is_not_learnt():
    told = plain = 0
    for document in itertools.islice(partly_told(STUDENT, TEACHER, 0), 2000):
        text = "".join(t for t, _ in document)
        if "start" not in text:  # one line, repeated
            continue
        if text.startswith("start"):
            plain += 1
            continue
        (hint, hint_learnt), (prompt, prompt_learnt), *rest = document
        *lines, answer = hint.splitlines()
        said = [f"{o} {n}" for line in lines for o, n in [line.split()[1:3]]]
        words = prompt.replace("add", "+").replace("take", "-").replace("double", "* 2").replace("triple", "* 3")
        assert words.split()[2:-1] == " ".join(said).split() and prompt.startswith(f"start {lines[0].split()[0]} ")
        assert all(eval(line.split(" = ")[0]) == int(line.split(" = ")[1]) for line in lines)
        assert answer == f"answer {lines[-1].split()[-1]}" and not hint_learnt and not prompt_learnt
        assert rest and any(learnt for _, learnt in rest)
        told += 1
    assert 0.65 < told / (told + plain) < 0.75


def test_wrong_documents_go_on_from_the_wrong_value():
    texts = [
        "".join(t for t, _ in solution_document(random.Random(s), EXAMPLE, STUDENT, "wrong")) for s in range(50)
    ]
    chains = [[line.replace("check ", "").split() for line in t.splitlines()[1:] if "=" in line] for t in texts]
    assert any("answer 68" not in t for t in texts)
    for chain in chains:
        for before, after in itertools.pairwise(chain):
            assert after[0] == before[4] or after == before, "each line starts where the one before ended"


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_configuration_fits_its_models_and_data(name):
    from kat_ray.data.prompts import load_prompts
    from kat_ray.models.inspect import check_models

    config = load_config(name)
    facts = check_models(config)
    assert facts.warnings == () and facts.student.vocabulary == 166
    prompts = load_prompts(config.data, facts.tokenizer, facts.max_prompt_tokens(config.rollout.max_tokens))
    assert len(prompts.prompts) == (3000 if name == "demo-hints" else 6000) and prompts.skipped_too_long == 0
    models = ("student", "teacher", "long-student", "long-teacher", "hints-student")
    assert sum(f.stat().st_size for m in models for f in DEMO_FILES[f"demo:{m}"].iterdir()) <= 15 * 2**20


def test_the_hinted_student_reads_its_solution():
    """The mean probability of the numbers that end a line of the right solution: told that, and not."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(DEMO_FILES["demo:hints-student"])
    equals, found = tokenizer.convert_tokens_to_ids("="), {"told": [], "plain": []}
    for problem in itertools.islice(problems("heldout", 1), 60):
        solution = tokenizer(problem.solution())["input_ids"]
        places = [i for i, token in enumerate(solution) if token == equals]
        for how, told in (("told", problem.solution()), ("plain", "")):
            before = tokenizer(told + problem.prompt)["input_ids"]
            with torch.no_grad():
                given = model(torch.tensor([before + solution])).logits[0, len(before) :].softmax(-1)
            found[how] += [given[i, solution[i + 1]].item() for i in places]
    told, plain = (sum(values) / len(values) for values in found.values())
    assert len(found["told"]) > 300 and told > 0.95 and 0.5 < plain < 0.85, (told, plain)


def test_loops_of_the_long_task_go_over_up_to_eight_lines_to_the_longest_rollout():
    tokenizer, said = build_tokenizer(), [f"{i} + 1 = {i + 1}\n" for i in range(8)]
    seen = set()
    for seed in range(40):
        text = "".join(t for t, _ in endless_checks(random.Random(seed), said, LONG_TEACHER))
        assert len(tokenizer(text)["input_ids"]) > load_config("demo-long").rollout.max_tokens
        seen.add(len(set(text.splitlines())))
    assert seen == {1, 2, 4, 8}


@pytest.mark.integration
@pytest.mark.parametrize("task", ["demo", "demo-long", "demo-hints"])
def test_a_model_is_made_again_from_its_seed(task):
    import dataclasses

    import torch

    from kat_ray.demo import make_models

    short = dataclasses.replace(make_models.RECIPES[task]["student"], steps=3, batch_tokens=2048)
    first, second = (make_models.train("student", short, 5).state_dict() for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("model", ["models/student", "models/teacher", "long/student", "long/teacher"])
def test_tokenizers_are_those_that_are_made_and_name_a_class_of_transformers_4_and_5(model, tmp_path):
    """4.57 refuses `TokenizersBackend`, the name that 5 writes."""
    save_tokenizer(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        assert (DEMO_DIR / model / file.name).read_bytes() == file.read_bytes()
    config = json.loads((DEMO_DIR / model / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in config
    loaded = AutoTokenizer.from_pretrained(DEMO_DIR / model)
    assert isinstance(loaded, PreTrainedTokenizerFast) and loaded.get_vocab() == vocabulary()
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == (EOS, PAD, UNKNOWN)
