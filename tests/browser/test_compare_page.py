"""The page of a comparison in a real browser: it opens without a network, and its pictures and tables are there."""

from selenium.webdriver.common.by import By

from kat_ray.cli import main as cli
from tests.browser.pages import open_page
from tests.support.comparisons import finish_rule


def test_the_page_opens(browser, tmp_path):
    along = {1: [1, 0, 0], 2: [2, 0, 1]}
    arms = [(rule, seed) for rule in ("none", "kat") for seed in (0, 1)]
    runs = [finish_rule(tmp_path, rule, seed, [3, 0, seed], along=along) for rule, seed in arms]
    assert cli.main(["compare", "--runs", *map(str, runs), "--out", str(tmp_path / "page")]) == 0
    open_page(browser, tmp_path / "page" / "compare.html")
    images = browser.find_elements(By.TAG_NAME, "img")
    titles = [
        "Accuracy against tokens", "Accuracy along the runs", "Differences", "Over the steps",
    ]  # fmt: skip
    assert [i.get_attribute("alt") for i in images] == titles
    assert all(browser.execute_script("return arguments[0].naturalWidth > 500", i) for i in images)
    assert len(browser.find_elements(By.TAG_NAME, "table")) == 4, "at equal steps, tokens and TFLOP, and every rule"
    assert "Each rule from the same start" in browser.find_element(By.TAG_NAME, "main").text
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
