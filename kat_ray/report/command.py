"""`kat-ray report`: a run as one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kat_ray.config.load import config_yaml
from kat_ray.errors import UserError
from kat_ray.models.inspect import load_tokenizer
from kat_ray.report import curves, rollout_figures
from kat_ray.report.browser import choose, prompts_of, rollouts_for
from kat_ray.report.cut_figure import cut_picture, example
from kat_ray.report.held_out import held_out_sections
from kat_ray.report.page import Card, Section, embedded_json, png_of, render, script, write_page
from kat_ray.report.phases import Lens, PhaseRow, Phases, lens_of, phase_table, phases_of, teacher_tokens
from kat_ray.report.rewards import reward_cards, reward_sections
from kat_ray.report.run_records import RunRecords, read_run
from kat_ray.report.sources import source_sections
from kat_ray.termination import RULES, Effect, kat_parameters
from kat_ray.termination.settings import KatParameters, KatSettings
from kat_ray.types.records import DEFAULT_TEACHER

_TOP_TOKENS = 12
_OF_SCORES = ("threshold", "health", "heatmap", "position")  # sections that a teacher's scores are drawn in
_GRADIENT_ROLLOUTS = 64


def report(
    run_dir: Path,
    rule: KatSettings | None,
    *,
    out: Path | None,
    rollouts: int,
    gradients: Sequence[Path] | None,
    say: Callable[[str], None],
) -> list[Path]:
    """Write the report of a run; returns its files, the page first.

    `rule` divides rollouts into stages; None takes the run's own with its own thresholds, or the default settings
    for a run without the KAT rule.
    """
    records = read_run(run_dir)
    for note in records.notes:
        say(f"warning: {note}")
    settings, own = _rule_of(records, rule)
    tokenizer = load_tokenizer(records.config.student)
    phases, trouble = _phases(records, settings, own)
    if not records.config.used_teachers:
        trouble = (
            "the run had no teacher (objective.opd.weight = 0, termination.rule = none), and so no KL to look at"
        )
    lens = lens_of(records, settings, own, phases)
    sections = [*_step_sections(records, phases, lens), *_rollout_sections(records, lens, tokenizer)]
    if not len(records.traces.d):  # no teacher was asked
        sections = [section for section in sections if section.name not in _OF_SCORES]
    if phases is not None and not trouble:
        sections += _phase_sections(records, phases, tokenizer, gradients, say)
    elif gradients is not None:
        raise UserError(f"--gradients: {trouble}")
    prompts, missing = prompts_of(records.config, tokenizer)
    chosen = choose(records, rollouts)
    data = rollouts_for(records, chosen, lens, tokenizer, prompts)
    html = render(
        "report.html.j2",
        {
            "title": f"kat-ray: {records.config.run.name}",
            "subtitle": _subtitle(records, settings, own),
            "notes": [*records.notes, *filter(None, [trouble, missing])],
            "cards": _cards(records),
            "sections": sections,
            "browser_text": _browser_text(records, lens, len(chosen)),
            "marks": _marks(records, lens),
            "stops": sorted(set(records.per_rollout("stop_reason"))),
            "data": data,
            "data_json": embedded_json(data),
            "config": config_yaml(records.config),
            "script": script("browser.js"),
        },
    )
    files = write_page(html, sections, (out or run_dir / "report") / "report.html")
    for file in files:
        say(str(file))
    return files


def _rule_of(records: RunRecords, rule: KatSettings | None) -> tuple[KatParameters, bool]:
    own = records.config.termination
    if rule is not None:
        return rule, rule == own
    kat = kat_parameters(own)
    return (KatSettings(), False) if kat is None else (kat, True)


def _phases(records: RunRecords, rule: KatParameters, own: bool) -> tuple[Phases | None, str | None]:
    try:
        phases = phases_of(records, rule, own)
    except UserError as error:
        return None, f"No stages: {error}"
    if not phases.active.any():
        return phases, (
            "No stages: the rule was never active on these rollouts (termination.min_samples, min_steps, window); "
            "try other settings, such as `kat-ray report RUN window=16 min_samples=64 min_steps=2`"
        )
    return phases, None


def _browser_text(records: RunRecords, lens: Lens, shown: int) -> str:
    window, own = lens.rule.window, records.config.termination.rule
    effect = RULES[own].effect
    count = len(records.traces.step)
    how = "All rollouts." if shown == count else f"{shown:,} of {count:,} rollouts: a sample of every kind."
    underlined = "Underlined tokens are not trained on."
    if records.config.objective.rl.weight:
        underlined = "Underlined tokens have no KL in the loss; the policy's loss goes on up to the confirmation."
    text = (
        f"{how} "
        "A token is coloured by its reverse KL; point at one, click it or use the arrow keys to see its figures. "
        f"{underlined} The curve is the mean KL of the last {window} tokens. "
    )
    if not lens.own:
        return text + (
            "The threshold, and marks called applied, are those of the KAT settings named at the top, applied "
            "afterwards; "
            f"the run's own rule was {own}, "
            + (
                "which cut nothing."
                if effect is Effect.NOTHING
                else "and what it did is marked as cut and would cut."
            )
        )
    does = "cuts a rollout" if effect is Effect.CUTS else "divides a rollout"
    windows = f"{lens.rule.consecutive} windows in a row"
    return text + f"The run's rule {does} where this mean stays below the threshold for {windows}."


def _marks(records: RunRecords, lens: Lens) -> list[tuple[str, str, str]]:
    """The marks that the browser can show: class, words, meaning."""
    marks = []
    if RULES[records.config.termination.rule].effect is not Effect.NOTHING:
        marks += [("", "cut", "by the run's rule"), ("would", "would cut", "a probe")]
    if not lens.own:
        marks.append(("applied", "applied", "where the settings applied afterwards would cut"))
    elif RULES[lens.rule.rule].effect is not Effect.CUTS:
        marks.append(("applied", "KAT", "would cut; tokens after it are weighted"))
    return marks


def _subtitle(records: RunRecords, rule: KatParameters, own: bool) -> str:
    config = records.config
    whose = "the run's own" if own else "not the run's own, calibrated on its rollouts"
    threshold = f"eta {rule.eta:g}" if rule.budget is None else f"budget {rule.budget:.1%}"
    teachers = config.used_teachers
    named = teachers.keys() != {DEFAULT_TEACHER}
    paths = (f"{teacher.path} ({name})" if named else teacher.path for name, teacher in teachers.items())
    source = ", ".join(paths) or "rewards alone"
    return (
        f"{config.student.path} from {source}, rule {config.termination.rule}, "
        f"seed {config.run.seed}, {len({line['step'] for line in records.steps if 'learner/loss' in line})} steps, "
        f"{len(records.traces.step):,} rollouts. Stages by the KAT rule with window {rule.window}, "
        f"C {rule.consecutive}, exempt {rule.exempt}, {threshold} ({whose})."
    )


def _cards(records: RunRecords) -> list[Card]:
    traces, cards = records.traces, []
    evaluations = [e for e in records.evaluations if {"avg_at_k", "pass_at_k"} <= e.keys()]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        cards.append(
            Card(f"{first['avg_at_k']:.1%} → {last['avg_at_k']:.1%}", f"avg@{last['k']} on held-out problems")
        )
        cards.append(Card(f"{first['pass_at_k']:.1%} → {last['pass_at_k']:.1%}", f"pass@{last['k']}"))
    cards += reward_cards(records)
    generated = sum(records.series("rollout/generated_tokens")[1])
    kept = sum(records.series("rollout/kept_tokens")[1])
    cards.append(Card(f"{generated:,.0f}", "tokens generated"))
    cards.append(Card(f"{kept:,.0f}", "tokens kept"))
    cards.append(Card(f"{traces.trapped.mean() if len(traces.step) else 0:.0%}", "rollouts ended by the rule"))
    probes = traces.probe & (traces.would_cut >= 0)
    if probes.any():
        graded = probes & (traces.correct >= 0)
        saved = (traces.lengths - traces.would_cut)[probes].mean()
        cards.append(Card(f"{saved:.0f}", "tokens saved by a cut, mean over probes"))
        if graded.any():
            right = (traces.correct[graded] == 1).mean()
            cards.append(Card(f"{right:.0%}", "of the probes it would cut answered right"))
    if records.summary is not None and "wall_seconds" in records.summary:
        cards.append(Card(f"{records.summary['wall_seconds']:,.0f} s", "wall time"))
    return cards


def _section(name: str, title: str, text: str, fig: Any) -> Section:
    return Section(name, title, text, png=png_of(fig))


def _step_sections(records: RunRecords, phases: Phases | None, lens: Lens) -> list[Section]:
    sections = [
        _section(
            "learning", "Learning",
            "KL should fall and accuracy rise. The faint lines are single steps, the strong ones trailing means.",
            curves.learning(records),
        ),
        *held_out_sections(records),
        *reward_sections(records),
        *source_sections(records),
        _section(
            "stops", "How rollouts ended",
            "Trapped rollouts were ended by the rule, max_tokens ones reached their limit (or the rule's length "
            "budget), failed ones were given up by the engine. A growing share of max_tokens is an early sign of "
            "loops, or of answers that no longer end.",
            curves.stops(records),
        ),
        _section(
            "threshold", "Threshold",
            "The threshold has to follow the KL scale. If KL falls and the threshold stays, too much is cut: "
            "make the calibration forget sooner (a smaller buffer). m(y) is the smallest window mean of a rollout, "
            "drawn for rollouts that were seen to their end: a cut one never shows its later, smaller windows."
            + ("" if lens.own else " The threshold is that of the settings applied afterwards."),
            curves.threshold(records, phases, lens),
        ),
        _section(
            "health", "Health",
            "Of the kept tokens. In a healthy run the overlap rises and the entropy gap closes; a growing "
            "tail mass means that top k is too small.",
            curves.health(records),
        ),
    ]  # fmt: skip
    if records.series("probe/would_cut_share")[1]:
        text = (
            "Probes are never cut, so they show what cuts do. A rollout that would have been cut, but went on to a "
            "right answer, was not wasted."
        )
        sections.append(_section("probes", "What cuts cost and save", text, curves.probes(records)))
    return sections


def _rollout_sections(records: RunRecords, lens: Lens, tokenizer: Any) -> list[Section]:
    return [
        *_cut_section(records, tokenizer),
        _section(
            "heatmap", "KL of single tokens",
            "Each row is a rollout; dark is agreement, grey is no token. Rollouts with a mark come first, in the "
            "order of their marks; above them the others, by length. A trap is a dark stretch to the right of a "
            "mark that does not end. The drawn rollouts are a sample, and the longest twentieth of them runs off "
            "the edge.",
            rollout_figures.heat_map(records, lens),
        ),
        _section(
            "position", "KL by position",
            "Mean over all scored tokens at a position. Cut rollouts are missing after their cut, so the right end "
            "shows only those in which the rule saw no trap, and probes.",
            rollout_figures.position(records),
        ),
    ]  # fmt: skip


def _cut_section(records: RunRecords, tokenizer: Any) -> list[Section]:
    index = example(records)
    if index is None:
        return []
    text = (
        "The rollout whose KL fell furthest before the run's rule ended it. A cut is where the first low window "
        "began, and is known when enough of them are low; tokens that came in meanwhile are cut away, too."
    )
    return [_section("cut", "A cut", text, cut_picture(records, index, lambda ids: str(tokenizer.decode(ids))))]


def _phase_sections(
    records: RunRecords,
    phases: Phases,
    tokenizer: Any,
    gradients: Sequence[Path] | None,
    say: Callable[[str], None],
) -> list[Section]:
    sections = [
        _section(
            "onset", "Where agreement begins",
            f"The first low stretch of the {int(phases.active.sum()):,} rollouts that were seen to their end and "
            "for which the rule was active, as a share of all of them.",
            rollout_figures.onset(phases),
        ),
        Section(
            "stages", "Before, during and after agreement",
            "Only rollouts that were seen to their end have all three. The stage after begins with the token that "
            "lifts the window mean back to the threshold. Where KL does not return to its level from before, a cut "
            "loses little.",
            png=png_of(rollout_figures.stages(phases)),
            table=_phase_cells(phase_table(records, phases)),
        ),
    ]  # fmt: skip
    found = teacher_tokens(records, phases, _TOP_TOKENS)
    if found:
        text = (
            "The teacher's most likely token, counted over the tokens of each stage. What fills the agreement "
            "stage is what the teacher goes along with."
        )
        fig = rollout_figures.teacher_top(found, lambda i: str(tokenizer.decode([i])))
        sections.append(_section("teacher-tokens", "The teacher's top tokens by stage", text, fig))
    if gradients is not None:
        sections.append(_gradient_section(records, phases, gradients, say))
    return sections


def _phase_cells(rows: Sequence[PhaseRow]) -> list[list[str]]:
    names = {
        "overlap": "overlap",
        "entropy_gap": "entropy gap, nats",
        "teacher_max": "teacher max",
        "student_tail": "tail mass",
    }
    cells = [["stage", "tokens", "share", "KL, nats", *names.values()]]
    for row in rows:
        features = [row.features.get(name) for name in names]
        cells.append(
            [row.name, f"{row.tokens:,}", f"{row.share:.1%}", f"{row.kl:.4g}"]
            + ["-" if value is None else f"{value:.3g}" for value in features]
        )
    return cells


def _gradient_section(
    records: RunRecords, phases: Phases, given: Sequence[Path], say: Callable[[str], None]
) -> Section:
    from kat_ray.report.gradients import checkpoints_of, gradient_evidence

    first, last = checkpoints_of(records, given)
    say(f"gradients at {first}, update up to {last}")
    evidence = gradient_evidence(records, phases, first, last, _GRADIENT_ROLLOUTS)
    chances = (f"{group}: share (chance {evidence.chance[group]:.2%})" for group in evidence.shares)
    table = [["stage", "tokens", "gradient norm", *chances]]
    for phase, count in evidence.tokens.items():
        if count:
            shares = (f"{by_phase[phase]:.2%}" for by_phase in evidence.shares.values())
            table.append([phase, f"{count:,}", f"{evidence.norms[phase]:.3g}", *shares])
    text = (
        "Share of each stage's gradient that lies in the top singular subspace of the net update from "
        f"{first.name} to {last.name}: the higher it is, the more the stage's tokens pull the way training went. "
        "Gradient of the mean KL over the stage's tokens at the first checkpoint, over the run's first "
        f"{evidence.rollouts} rollouts with a trap that were seen to their end; its norm says how strongly the "
        "mean token pulls."
    )
    return Section("gradients", "Gradients of the stages", text, table=table)
