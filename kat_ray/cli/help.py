"""What `--help` says."""

from __future__ import annotations

DESCRIPTION = """\
On-policy distillation of language models on Ray. A rollout that has fallen into a KL agreement trap is
ended while it is still being generated (KAT, arXiv 2606.09471)."""

EXIT_CODES = """\
exit codes:
  0    done
  1    doctor found something that would stop a run; or a fault of kat-ray's own, with its traceback
  2    a mistake in the arguments, the configuration, a model, the data or the cluster: the message says which
  130  interrupted (Ctrl-C); 143: told to end (SIGTERM). A run has saved a checkpoint: resume it with --resume"""

OVERRIDES = """\
CONFIG is a YAML file, or `demo` for the embedded task with its tiny models (`demo-rl`: with rewards beside the
teacher; `demo-long`: with rollouts that go astray for up to 1,000 tokens; `demo-hints`: taught by itself, told the
solutions). Every field can be overridden: section.field=value, with the value in YAML. docs/configuration.md lists
the fields."""

OVER_A_RUN = """\
RUN is a run directory with traces. Each FIELD is a setting of the rule (section termination), such as window,
consecutive, eta, stride and exempt for kat; a list of values is swept. docs/termination.md defines them. With
--objective it is one of objective.rl, such as advantage and cut_reward (docs/rl.md)."""

ABOUT_REPORT = """\
RUN is a run directory. The page needs no network: learning curves, how rollouts ended, threshold, KL of single
tokens, the stages before, during and after agreement, and a browser of rollouts. The pictures are saved as PNG too.
Each FIELD is a setting of the KAT rule that divides rollouts into stages. The default is the run's own rule."""

ABOUT_WATCH = """\
RUN is a run directory: one that goes on, has ended, or is about to begin. The screen has progress, time left, and
the course of KL, reward, accuracy, rollouts that the rule ended, thresholds and speed. Ctrl-C leaves it alone.
A submitted job is shown by the lines of its log, which have fewer figures than its records."""

ABOUT_TRACK = """\
RUN is a run directory, finished or not. Its metrics, configuration and summary go to trackers that lack them, under
the run's one id; what a tracker was told before is not told again (docs/tracking.md)."""

ABOUT_EXPORT = """\
The model is one like any other: for transformers (4.57 too) and vLLM, as student or teacher of another run. The
tokenizer's files and config.json are the student's, as they came; README.md is a model card with data, rule,
figures and commands. Of a run with learner.lora the adapters are merged with the student that they were trained on,
which is found where it was then, and checked (docs/lora.md), or with --adapter stay as they are: docs/export.md."""

ABOUT_EVAL = """\
RUN_OR_MODEL is a run, whose newest checkpoint is taken with the run's configuration, or any model directory or hub
id, with --data or --config. Every field can be overridden: section.field=value, such as evaluation.k=8 and
evaluation.max_tokens=4096 (docs/data.md)."""

ABOUT_DATA = """\
The first prompts as their tokens, in colours in turn (special tokens in one of their own), with gold answers and
what a teacher is told in their place; rows that are refused, by reason; what is left out; lengths. No weights are
read.
Exit code 1: a run would be refused."""

ABOUT_SERVE = """\
Runs with teacher.type = http ask it for the scores that a teacher of their own would give: docs/teachers.md. It
has one model and any number of runs. It ends on SIGTERM or Ctrl-C, once the requests under way are answered; one
that is started again in its place takes runs up where they are."""

ABOUT_JOB = """\
NAME is a job's id, or a run's name, which means its newest job. The cluster is reached through its dashboard."""

ABOUT_BENCH = """\
Each row is a ratio, both sides measured in one run. Groups: end_to_end and rewards (they install the peer into
.venv-peer once), pipeline, checkpoint, sampler, teacher, learner, memory, publication, offline. Leave the machine
alone while it runs."""

EXAMPLES = {
    "": """\
examples:
  kat-ray doctor demo                         what would stop a run on this machine
  kat-ray train demo                          the embedded task, minutes on a laptop
  kat-ray train demo termination.rule=none    the same without termination
  kat-ray config demo > my.yaml               a file to start your own from""",
    "train": """\
examples:
  kat-ray train demo run.steps=20
  kat-ray train my.yaml learner.lr=1e-5 'learner.betas=[0.9, 0.95]' evaluation.data=null
  kat-ray train my.yaml termination.rule=none run.name=without
  kat-ray train --resume runs/latest                 resume a run that was stopped, was killed or failed
  kat-ray train --resume runs/latest run.steps=300   the same, for more steps than before

Models and data are checked before anything is started. Records go to <run.dir>/<run.name>.""",
    "eval": """\
examples:
  kat-ray eval runs/latest                           the newest checkpoint of a run, with the run's configuration
  kat-ray eval demo:student --config demo            a model, on a configuration's held-out problems
  kat-ray eval out/model --config my.yaml evaluation.k=8 --json
  kat-ray eval Qwen/Qwen3-0.6B --data gsm8k math500 aime24 --chat --greedy evaluation.max_tokens=4096""",
    "doctor": """\
examples:
  kat-ray doctor                  machine and packages only
  kat-ray doctor my.yaml          also models, tokenizers, data, resources
  kat-ray doctor my.yaml sampler.replicas=4
  kat-ray doctor my.yaml --cluster --address http://HEAD:8265     which of its nodes each role would get

Nothing is started and no weights are loaded. Each line is ok, warn or FAIL.""",
    "compare": """\
examples:
  kat-ray compare demo --rules none kat length_matched --seeds 0 1 2
  kat-ray compare my.yaml --rules none kat kat:eta=0.5 fixed_prefix:n=512 --out runs/which-eta run.steps=200
  kat-ray compare --runs runs/a runs/b --out /tmp/a-b          finished runs; says what else they differ in

Each rule runs from the same start on the same prompts, once for each seed, in DIR/RULE/seed-N. Finished
runs are not repeated: the same command goes on with a comparison that was interrupted. length_matched cuts at the
lengths of kat's run of the same seed, regardless of KL; if there are several such rules,
length_matched:of=kat-eta=0.5 names one by its folder.

Rules are compared after equal steps, and at equal generated tokens and TFLOP by evaluations along the runs
(--evaluate-every). These cannot be added to a run that has ended without them.""",
    "replay": """\
examples:
  kat-ray replay runs/latest                                  a sweep around the run's own settings
  kat-ray replay runs/latest eta=[0.1,0.3,0.5] window=32      these settings, the others as in the run
  kat-ray replay runs/none budget=[0.01,0.02,0.05] --budget 0.02 --out /tmp/replay
  kat-ray replay runs/latest --rule fixed_prefix n=[32,64,128]
  kat-ray replay runs/latest --objective                      a run's advantages, computed again from its rewards
  kat-ray replay runs/latest --objective advantage=[grpo,rloo] cut_reward=exclude

No model is loaded. What a cut removes is known only of rollouts that were seen to their end: a run's probes, or
all rollouts of a run with termination.rule=none.""",
    "report": """\
examples:
  kat-ray report runs/latest                                 RUN/report/report.html
  kat-ray report runs/none window=16 exempt=8 min_samples=64 min_steps=2
  kat-ray report runs/a runs/b                               side by side: runs/a/report/side-by-side.html
  kat-ray report runs/latest --gradients                     and which stage pulls the way that training went""",
    "watch": """\
examples:
  kat-ray watch runs/latest
  kat-ray watch runs/latest --once | tail -n 20              one frame, for a pipe
  kat-ray watch my-run --address http://127.0.0.1:8265       a submitted job""",
    "track": """\
examples:
  kat-ray track runs/latest --to wandb mlflow                into RUN/tracking, without a network
  MLFLOW_TRACKING_URI=http://mlflow:5000 kat-ray track runs/latest --to mlflow --online""",
    "export": """\
examples:
  kat-ray export runs/latest --to out/model
  kat-ray export runs/latest/checkpoints/step-100 --to out/model --base /models/Qwen3-0.6B --dtype bfloat16
  kat-ray export runs/latest --to hub:me/my-model --private
  kat-ray export runs/latest --to out/adapter --adapter --base Qwen/Qwen3-0.6B    and what they go beside""",
    "data": """\
examples:
  kat-ray data demo
  kat-ray data my.yaml --prompts 1 data.chat_template_kwargs.enable_thinking=false
  kat-ray data openai/gsm8k --model Qwen/Qwen3-0.6B data.name=main data.prompt_column=question
  kat-ray data my.yaml --heldout
  kat-ray data my.yaml --heldout maths                       the set evaluation.sets.maths""",
    "serve-teacher": """\
examples:
  kat-ray serve-teacher demo:teacher --dtype float32
  kat-ray serve-teacher org/model --num-gpus 1 --host 0.0.0.0 --token-env TEACHER_TOKEN""",
    "bench": """\
examples:
  kat-ray bench                               everything; writes docs/benchmarks.md and docs/benchmarks.json
  kat-ray bench --only sampler teacher        these groups; the others' results stay""",
    "submit": """\
examples:
  kat-ray submit demo run.dir=/runs                      to the dashboard of this machine, 127.0.0.1:8265
  kat-ray submit my.yaml --address http://HEAD:8265      a YAML file inside the working tree
  kat-ray submit my.yaml --dry-run                       what would be uploaded: every file, the largest first
  kat-ray submit my.yaml --no-wait                       return as soon as it is submitted

The configuration is checked first, then the working tree is uploaded (without .git, runs and whatever .gitignore
names), and `kat-ray train` runs in it on the head. A run that was stopped or that failed resumes when it is
submitted again under the same name and configuration. For a cluster in token mode, set RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH.

The exit code is the job's own; Ctrl-C stops following, not the job.""",
    "status": """\
examples:
  kat-ray status my-run                  the newest job of this run
  kat-ray status my-run-2                this job""",
    "logs": """\
examples:
  kat-ray logs my-run --follow""",
    "stop": """\
examples:
  kat-ray stop my-run                    its run writes a checkpoint and can be submitted again""",
    "list": """\
examples:
  kat-ray list --address http://HEAD:8265""",
    "config": """\
examples:
  kat-ray config demo                    the embedded configuration, every field spelled out
  kat-ray config my.yaml run.steps=20    what a run would use
  kat-ray config --docs > docs/configuration.md""",
}
