"""What is said of an engine's prefix cache, and once only."""

from actors.teacher.prefix_cache import BAD, WINDOW, PrefixCacheWatch


def said(watch, *chunks):
    return [line for chunk in chunks for line in watch.observe(*chunk)]


def test_a_cache_that_keeps_its_rollouts_says_nothing():
    watch = PrefixCacheWatch(capacity=1000, block=16)
    assert said(watch, *[(WINDOW, int(BAD * WINDOW), 1000)] * 5) == []


def test_live_tokens_beyond_the_cache_are_said_once_with_the_fields_to_change():
    watch = PrefixCacheWatch(capacity=1000, block=16)
    (line,) = said(watch, (10, 10, 1000), (10, 10, 1001), (10, 10, 2000))
    assert line.startswith("live rollouts have 1,001 tokens") and "holds 1,000" in line
    assert all(f in line for f in ("scorer.gpu_memory_utilization", "scorer.replicas", "rollout.prompts_per_step"))


def test_tokens_that_are_run_again_are_said_once_of_a_whole_window():
    watch = PrefixCacheWatch(capacity=1000, block=16)
    assert said(watch, (WINDOW - 1, 10 * WINDOW, 0)) == [], "too early to tell"
    (line,) = said(watch, (1, 0, 0), *[(WINDOW, 9 * WINDOW, 0)] * 3)
    assert line.startswith("the teacher ran 10.0 tokens for each") and "blocks of 16" in line


def test_a_good_beginning_does_not_hide_a_bad_end():
    watch = PrefixCacheWatch(capacity=1000, block=16)
    assert len(said(watch, *[(WINDOW, WINDOW, 0)] * 50, (WINDOW, 2 * WINDOW, 0))) == 1
