"""End to end: whole training steps (generate, score, learn) of kat-ray and of the peer, on the same work.

The same student, teacher, prompts in the same order, number and length of rollouts, sampling settings, float32 and
learning rate. Sides run one at a time; where a size has several turns, the second is in the opposite order, so that
a busy minute of the machine does not fall on one side only. The first step of every run is warm-up, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from actors.bench.figure import Figure
from actors.bench.pairs import Pair, make_pair
from actors.bench.sides import WARM_UP, SideError, Size, Step, install_peer, run_kat_ray, run_peer

GROUP = "end_to_end"
LONG = Size(
    "tiny 256 x 512", "tiny", rollouts=256, max_tokens=512, steps=3, micro_batch=32, turns=1, peer_vllm=True
)
SHORT = Size("tiny 48 x 224", "tiny", rollouts=48, max_tokens=224, steps=8, micro_batch=48, turns=1)
LARGE = Size("large 16 x 128", "large", rollouts=16, max_tokens=128, steps=2, micro_batch=16, turns=1)
_PROBE = Size("probe", "tiny", rollouts=8, max_tokens=16, steps=1, micro_batch=8, turns=1, timeout=300)

NONE, KAT, PEER, PEER_VLLM = "none", "kat", "peer", "peer-vllm"
_REPAIRED = (
    "the peer's vLLM generation does not run as it is ({why}); measured with its weights handed over by vLLM's "
    "reload_weights and its engine in float32"
)


@dataclass
class Runs:
    """The measured steps of each side of one size, all turns one after the other; or why there are none."""

    size: Size
    steps: dict[str, list[Step]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def of(self, *sides: str) -> list[list[Step]]:
        """The steps of these sides; `SideError` if one of them has none."""
        for side in sides:
            if side in self.failures:
                raise SideError(f"{side}: {self.failures[side]}")
        return [self.steps[side] for side in sides]


def measure(
    folder: Path,
    peer_venv: Path,
    say: Callable[[str], None] = print,
    sizes: Sequence[Size] = (LONG, SHORT, LARGE),
) -> list[Figure]:
    """All figures of this part, below `folder` (models, logs); the peer's environment is made in `peer_venv`."""
    folder = folder.resolve()
    try:
        python: Path | None = install_peer(peer_venv.resolve(), folder)
        missing = ""
    except SideError as error:
        python, missing = None, f"the peer's environment could not be made: {error}"
    # As it is, or why not: tried once, on next to nothing.
    as_it_is = missing or _try_vllm(make_pair(_PROBE.pair, folder / "pairs"), folder / "probe", python)
    figures: list[Figure] = []
    for size in sizes:
        runs = _run_turns(size, folder, python, missing, say, repair=bool(as_it_is))
        figures += _figures(runs, as_it_is)
    return figures


def _try_vllm(pair: Pair, folder: Path, python: Path | None) -> str:
    assert python is not None
    try:
        run_peer(_PROBE, pair, "vllm", folder, python=python)
    except SideError as error:
        return str(error).splitlines()[-1]
    return ""


def _run_turns(
    size: Size, folder: Path, python: Path | None, missing: str, say: Callable[[str], None], *, repair: bool
) -> Runs:
    pair = make_pair(size.pair, folder / "pairs")
    runs = Runs(size)
    sides = _sides(size, pair, python, repair)
    if python is None:
        runs.failures |= {PEER: missing, PEER_VLLM: missing}
    for turn in range(size.turns):
        for side in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            if side in runs.failures:
                continue
            where = folder / size.name.replace(" ", "") / f"turn-{turn}"
            try:
                steps = sides[side](where)
            except SideError as error:
                runs.failures[side] = str(error)
                say(f"{size.name}, {side}: {error}")
                continue
            runs.steps.setdefault(side, []).extend(steps)
            say(f"{size.name}, turn {turn + 1}, {side}: {rate(steps):,.0f} tokens/s")
    return runs


def _sides(size: Size, pair: Pair, python: Path | None, repair: bool) -> Mapping[str, Callable[[Path], list[Step]]]:
    def ours(rule: str) -> Callable[[Path], list[Step]]:
        return lambda where: run_kat_ray(size, pair, rule, where)

    def peer(backend: str, repair: bool) -> Callable[[Path], list[Step]]:
        assert python is not None
        return lambda where: run_peer(size, pair, backend, where, python=python, repair=repair)

    sides = {NONE: ours("none")}
    if size.pair == "tiny":
        sides[KAT] = ours("kat")  # the rule's settings fit this student; random weights have no traps
    if python is not None:
        sides[PEER] = peer("transformers", False)
        if size.peer_vllm:
            sides[PEER_VLLM] = peer("vllm", repair)
    return sides


def _figures(runs: Runs, as_it_is: str) -> list[Figure]:
    size = runs.size
    note = _REPAIRED.format(why=as_it_is) if as_it_is else ""
    goals = {LONG.name: 2.0, SHORT.name: 1.2}
    figures = [
        _figure(
            runs, f"tokens per second, kat-ray / TRL with transformers generation, {size.name}",
            (NONE, PEER), faster, goals.get(size.name),
        )
    ]  # fmt: skip
    if size.pair != "tiny":
        return figures
    if size.peer_vllm:
        figures += [
            _figure(
                runs, f"tokens per second, kat-ray / TRL with vLLM generation, {size.name}",
                (NONE, PEER_VLLM), faster, 1.5, note=note,
            ),
            _figure(
                runs, f"time of the same steps, TRL with transformers generation / kat-ray with KAT, {size.name}",
                (KAT, PEER), sooner, 3.0,
            ),
        ]  # fmt: skip
    return [
        *figures,
        _figure(
            runs, f"|step time with KAT / without - generated tokens with KAT / without|, {size.name}",
            (KAT, NONE), unsaved, 0.1, "<=",
        ),
        _figure(
            runs, f"overshoot tokens / kept tokens with KAT, {size.name}", (KAT,), overshoot, 0.1, "<=",
            note="the embedded configuration: chunk_tokens 4, max_chunks_ahead 1",
        ),
    ]  # fmt: skip


def _figure(
    runs: Runs,
    name: str,
    sides: tuple[str, ...],
    value: Callable[..., tuple[float, dict[str, float]]],
    goal: float | None,
    sense: str = ">=",
    note: str = "",
) -> Figure:
    assert sense in (">=", "<=")
    figure = Figure(GROUP, name, None, goal, ">=" if sense == ">=" else "<=", note=note)
    try:
        steps = runs.of(*sides)
        ratio, detail = value(*steps)
    except SideError as error:
        return replace(figure, note=f"{error}" if not note else f"{error} ({note})")
    size = runs.size
    raw = {
        f"{side}_{unit}": [round(float(getattr(s, attribute)), 3) for s in own]
        for side, own in zip(sides, steps, strict=True)
        for unit, attribute in (("step_seconds", "seconds"), ("step_generated_tokens", "tokens"))
    }
    counts = {"turns": size.turns, "measured_steps_per_turn": size.steps, "warm_up_steps_per_turn": WARM_UP}
    return replace(figure, value=ratio, detail={**detail, **counts, **raw})


# --- ratios of measured steps -----------------------------------------------------------------------------


def rate(steps: Sequence[Step]) -> float:
    """Generated tokens per second of whole steps."""
    return sum(s.tokens for s in steps) / sum(s.seconds for s in steps)


def faster(ours: Sequence[Step], peer: Sequence[Step]) -> tuple[float, dict[str, float]]:
    """Our tokens per second by the peer's."""
    rates = {"kat_ray_tokens_per_second": rate(ours), "peer_tokens_per_second": rate(peer)}
    return rate(ours) / rate(peer), rates


def sooner(ours: Sequence[Step], peer: Sequence[Step]) -> tuple[float, dict[str, float]]:
    """The peer's seconds by ours, over the steps in which our rule was active."""
    pairs = _active(ours, peer)
    own, other = (sum(s.seconds for s in side) for side in zip(*pairs, strict=True))
    return other / own, {"kat_ray_seconds": own, "peer_seconds": other, "compared_steps": len(pairs)}


def unsaved(with_rule: Sequence[Step], without: Sequence[Step]) -> tuple[float, dict[str, float]]:
    """How far the share of time that is left differs from the share of tokens that is left."""
    pairs = _active(with_rule, without)
    seconds = [sum(s.seconds for s in side) for side in zip(*pairs, strict=True)]
    tokens = [sum(s.tokens for s in side) for side in zip(*pairs, strict=True)]
    time_ratio, token_ratio = seconds[0] / seconds[1], tokens[0] / tokens[1]
    detail = {"time_ratio": time_ratio, "token_ratio": token_ratio, "compared_steps": len(pairs)}
    return abs(time_ratio - token_ratio), detail


def overshoot(with_rule: Sequence[Step]) -> tuple[float, dict[str, float]]:
    """Tokens generated after the rule had confirmed, by the tokens kept."""
    active = [s for s, _ in _active(with_rule, with_rule)]
    late, kept = sum(s.overshoot or 0 for s in active), sum(s.kept or 0 for s in active)
    return late / kept, {"overshoot_tokens": late, "kept_tokens": kept, "compared_steps": len(active)}


def _active(with_rule: Sequence[Step], other: Sequence[Step]) -> list[tuple[Step, Step]]:
    """Steps of the same number, where the rule was active: they start from the same prompts."""
    pairs = [(a, b) for a, b in zip(with_rule, other, strict=True) if a.active]
    if not pairs:
        raise SideError("the rule was not active in any measured step")
    return pairs
