"""Spans and the trace file that shows them."""

import json

import pytest

from kat_ray.observability.timeline import ChromeTrace, Span, Timeline


def test_spans_are_handed_over_once_even_if_the_work_failed():
    timeline = Timeline()
    with timeline.span("a"):
        pass
    with pytest.raises(KeyError), timeline.span("b"):
        raise KeyError
    first, second = timeline.drain()
    assert (first.name, second.name) == ("a", "b") and first.start <= first.end <= second.start
    assert timeline.drain() == ()


def test_the_trace_holds_a_row_for_every_actor_and_microseconds_since_the_first_span(tmp_path):
    trace = ChromeTrace(tmp_path / "timeline.json")
    trace.add({"driver": [Span("sample", 100.0, 100.5)], "sampler:0": [Span("generate", 100.25, 100.5)]}, 1)
    trace.add({"driver": [], "sampler:0": [Span("send", 101.0, 101.001)]}, 2)
    text = (tmp_path / "timeline.json").read_text()
    events = json.loads(text.rstrip().rstrip(",") + "]")  # viewers close it themselves
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {0: "driver", 1: "sampler:0"}
    spans = [(names[e["tid"]], e["name"], e["ts"], e["dur"], e["args"]["step"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("driver", "sample", 0, 500_000, 1),
        ("sampler:0", "generate", 250_000, 250_000, 1),
        ("sampler:0", "send", 1_000_000, 1_000, 2),
    ]
