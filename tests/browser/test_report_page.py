"""The report in a real browser: it opens without a network, and its rollouts can be filtered and looked at."""

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from kat_ray.cli import main as cli
from kat_ray.records.traces import PolicyTrace, write_traces
from kat_ray.types.records import StopReason
from tests.browser.pages import open_page
from tests.support.reports import APPLIED, STAGES, row, small_run, write_run

# Change a filter; returns how many elements the page then has.
CHANGE = """
const [name, value] = arguments, field = document.getElementById(name);
field.value = value;
field.dispatchEvent(new Event("change"));
return document.getElementsByTagName("*").length;
"""


def get(browser, name):
    return browser.find_element(By.ID, name)


def entries(browser):
    return get(browser, "list").find_elements(By.TAG_NAME, "button")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = small_run(tmp_path_factory.mktemp("report"))
    assert cli.main(["report", str(run)]) == 0
    return run / "report" / "report.html"


def test_rollouts_are_filtered_and_shown(browser, page):
    open_page(browser, page)
    assert len(entries(browser)) == 4 and get(browser, "count").text == "4 of 4"
    Select(get(browser, "stop")).select_by_visible_text("trapped")
    (only,) = entries(browser)
    assert only.text.startswith("#2 trapped") and only.get_attribute("aria-current") == "true"
    assert "cut at 3, confirmed after 8" in get(browser, "head").text
    tokens = get(browser, "tokens")
    (mark,) = tokens.find_elements(By.CLASS_NAME, "mark")
    assert mark.text == "cut at 3"
    assert len(tokens.find_elements(By.CLASS_NAME, "removed")) == 8 - 3
    Select(get(browser, "stop")).select_by_visible_text("all")
    Select(get(browser, "right")).select_by_visible_text("wrong")
    assert [e.text.split()[0] for e in entries(browser)] == ["#1"]
    Select(get(browser, "right")).select_by_visible_text("not graded")
    assert [e.text.split()[0] for e in entries(browser)] == ["#2"]
    get(browser, "probe").click()
    assert not entries(browser) and "No rollout matches" in get(browser, "head").text
    Select(get(browser, "right")).select_by_visible_text("all")
    assert [e.text.split()[0] for e in entries(browser)] == ["#0", "#1", "#3"]


def test_a_rollout_tells_its_reward_and_advantage(browser, tmp_path):
    run = small_run(tmp_path)
    rewarded = PolicyTrace(1.0, {}, None, 1.0, -0.25, 4, 0.1, 0.0, np.zeros(1, np.float32))
    nothing = PolicyTrace(None, {}, "score: too slow", 0.0, None, 0, 0.0, 0.0, np.zeros(1, np.float32))
    write_traces(
        run / "traces", 0, [row(0, STAGES, policy=rewarded), row(1, STAGES, policy=nothing), row(2, STAGES)]
    )
    assert cli.main(["report", str(run)]) == 0
    open_page(browser, run / "report" / "report.html")
    said = []
    for entry in entries(browser):
        entry.click()
        said.append(get(browser, "head").text)
    assert "reward 1.00 · advantage -0.250" in said[0]
    assert "no reward (score: too slow) · counts nothing in its group" in said[1]
    assert "reward" not in said[2] and "advantage" not in said[2]


def test_a_token_tells_its_figures(browser, page):
    open_page(browser, page)
    entries(browser)[0].click()
    assert "would be cut at 3" in get(browser, "head").text and "gold answer" in get(browser, "head").text
    assert get(browser, "prompt").text.startswith("start")
    token = get(browser, "tokens").find_element(By.CSS_SELECTOR, "[data-i='7']")
    ActionChains(browser).scroll_to_element(token).move_to_element(token).perform()
    info = get(browser, "info").text
    # d[7] = 0; the window of tokens 4..7 is 0; the threshold 0.5.
    assert (
        info.startswith("token 7") and "KL 0.00" in info and "window mean 0.00" in info and "threshold 0.5" in info
    )
    lines = get(browser, "chart").find_elements(By.TAG_NAME, "path")
    assert len(lines) == 1 and get(browser, "chart").text.count("threshold") == 1
    spans = [get(browser, "tokens").find_element(By.CSS_SELECTOR, f"[data-i='{i}']") for i in (0, 7)]
    colour = [span.value_of_css_property("background-color") for span in spans]
    assert colour[0] != colour[1]


def at(browser):
    (token,) = get(browser, "tokens").find_elements(By.CLASS_NAME, "at")
    return int(token.get_attribute("data-i"))


def test_tokens_are_reached_without_a_mouse(browser, page):
    open_page(browser, page)
    entries(browser)[0].click()
    box = get(browser, "tokens")
    browser.execute_script("arguments[0].focus()", box)
    keys = ((Keys.ARROW_RIGHT, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_DOWN, 10), (Keys.ARROW_LEFT, 9),
            (Keys.ARROW_UP, 0), (Keys.END, 10), (Keys.ARROW_RIGHT, 10), (Keys.HOME, 0))  # fmt: skip
    for key, token in keys:
        box.send_keys(key)
        assert at(browser) == token and get(browser, "info").text.startswith(f"token {token} ")
    for _ in range(7):
        box.send_keys(Keys.ARROW_RIGHT)
    info = get(browser, "info").text
    assert "window mean 0.00" in info and "threshold 0.5" in info
    cursor = get(browser, "cursor")
    assert cursor.get_attribute("visibility") == "visible"
    assert float(cursor.get_attribute("x1")) == pytest.approx(46 + 0.7 * (780 - 46 - 8))


def test_a_click_points_at_a_token(browser, page):
    open_page(browser, page)
    # A touch screen sends a click and no hovering.
    browser.execute_script("document.querySelector('#tokens [data-i=\"4\"]').click()")
    assert at(browser) == 4 and get(browser, "info").text.startswith("token 4 ")


def test_settings_applied_afterwards_are_named_so(browser, tmp_path):
    plain = dict(probe=False, threshold=None, minimum=None)
    rows = [[row(10 * s + i, STAGES if i < 2 else [1.0] * 12, step=s, **plain) for i in range(4)] for s in range(2)]
    run = write_run(tmp_path / "run", rows, ["termination.rule=none"])
    assert cli.main(["report", str(run), *APPLIED]) == 0
    open_page(browser, run / "report" / "report.html")
    entries(browser)[4].click()
    assert "applied afterwards: threshold 1.00 nats, cut at 1" in get(browser, "head").text
    (mark,) = get(browser, "tokens").find_elements(By.CLASS_NAME, "mark")
    assert mark.text == "applied at 1" and "threshold (applied)" in get(browser, "chart").text
    words = browser.find_element(By.TAG_NAME, "main").text
    assert "the run's own rule was none, which cut nothing" in words and "by the run's rule" not in words
    browser.execute_script("document.querySelector('#tokens [data-i=\"4\"]').click()")
    assert "threshold 1.00 (applied)" in get(browser, "info").text


def test_pictures_are_there(browser, page):
    open_page(browser, page)
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) >= 9
    assert all(browser.execute_script("return arguments[0].naturalWidth > 500", i) for i in images)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.integration
def test_ten_thousand_rollouts_open(browser, tmp_path):
    rng = np.random.default_rng(0)
    stops = [StopReason.EOS, StopReason.MAX_TOKENS]
    steps = [
        [
            row(100 * s + i, rng.exponential(0.4, int(rng.integers(20, 400))), step=s, stop_reason=stops[i % 2],
                correct=bool(i % 3), prompt_id=f"train:{i + 1}")
            for i in range(100)
        ]
        for s in range(99)
    ]  # fmt: skip
    steps.append([row(9900 + i, STAGES, step=99) for i in range(100)])
    run = write_run(tmp_path / "run", steps)
    assert cli.main(["report", str(run)]) == 0
    page = run / "report" / "report.html"
    assert page.stat().st_size < 20 * 2**20
    open_page(browser, page)
    # What makes it quick on any machine: the page has elements for the rollouts that it lists, and for the tokens
    # of one of them. Ten thousand rollouts alone would be 50,000 elements, their tokens two millions.
    changes = [("stop", ""), ("stop", "eos"), ("right", "true"), ("stop", ""), ("order", "mean"), ("order", "long")]
    for name, value in changes:
        count = browser.execute_script(CHANGE, name, value)
        assert count < 3000, f"{name} = {value}: {count} elements"
    assert "longest first" in browser.execute_script(
        "return document.getElementById('order').selectedOptions[0].text"
    )
    Select(get(browser, "right")).select_by_visible_text("all")
    assert "300 of 10,000 rollouts" in browser.find_element(By.TAG_NAME, "main").text
    assert get(browser, "count").text == "300 of 300"
    entries(browser)[0].click()
    first = int(entries(browser)[0].text.splitlines()[1].split()[0])
    assert len(get(browser, "tokens").find_elements(By.CSS_SELECTOR, "[data-i]")) == first > 300
