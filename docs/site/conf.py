"""Sphinx's settings of the documentation's site; what it reads is laid out by `build.py`."""

import re

project = "kat-ray"
author = "the authors of kat-ray"
extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown"}
html_theme = "furo"  # with its fonts, scripts and search on the page itself: nothing is fetched
html_title = "kat-ray"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
smartquotes = False  # `--` and `...` stand as they were written
pygments_style = "friendly"
highlight_language = "none"  # of blocks that name no language: commands, output, layouts
myst_heading_anchors = 6
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # a page may begin below the second level, as its parts do on GitHub


def github_slug(title: str) -> str:
    """The anchor that GitHub gives a heading, to which the pages' own links lead."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


myst_heading_slug_func = "conf.github_slug"
