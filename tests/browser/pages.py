"""Pages opened in a browser."""

import json


def open_page(browser, path):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    trouble = [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    assert not trouble
    messages = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(u.startswith(("file:", "data:")) for u in urls), urls
