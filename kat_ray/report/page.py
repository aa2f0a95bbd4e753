"""Pictures and words put together: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from kat_ray.errors import writing


@dataclass(frozen=True)
class Section:
    """One heading with its words, a picture (PNG), a table (its first row is the heading), or both."""

    name: str
    title: str
    text: str
    png: bytes | None = None
    table: Sequence[Sequence[str]] | None = None

    @property
    def image(self) -> str | None:
        """The picture in base64."""
        return None if self.png is None else base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Card:
    """One number that matters."""

    value: str
    label: str


def png_of(fig: Any) -> bytes:
    """A figure as PNG; frees it."""
    from kat_ray.report.style import save

    buffer = io.BytesIO()
    save(fig, buffer)
    return buffer.getvalue()


def embedded_json(content: Any) -> str:
    """JSON that can stand inside a script element, whatever text it holds."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill a template of this package."""
    files = resources.files("kat_ray.report")
    loader = jinja2.FunctionLoader(lambda name: (files / name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    css = (files / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(css=css, **values)


def script(name: str) -> str:
    """A script of this package."""
    return (resources.files("kat_ray.report") / name).read_text(encoding="utf-8")


def write_page(html: str, sections: Sequence[Section], page: Path) -> list[Path]:
    """Write the page, and every picture beside it as a PNG of the section's name. Returns the files."""
    files = [page]
    with writing(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html, encoding="utf-8")
        for section in sections:
            if section.png is not None:
                files.append(page.parent / f"{section.name}.png")
                files[-1].write_bytes(section.png)
    return files
