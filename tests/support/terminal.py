"""A terminal for tests: what stands on it after what was written to it, and whether a line was wider than it."""

import io
import re

_CODE = re.compile(r"\x1b\[(?P<private>\??)(?P<number>\d*)(?:;\d+)*(?P<letter>[A-Za-z])")


class Terminal(io.StringIO):
    """Knows what Rich's `Live` uses: cursor up and lines erased; colours and the cursor's look are passed over."""

    encoding = ""

    def __init__(self, width, encoding="utf-8"):
        super().__init__()
        self.width, self.encoding = width, encoding
        self.wrapped = []  # lines that were too wide

    def isatty(self):
        """It is one."""
        return True

    def screen(self):
        """Its lines, without spaces at their ends and without empty ones at the end."""
        lines, y, x, at, text = [""], 0, 0, 0, self.getvalue()
        self.wrapped = []
        while at < len(text):
            if code := _CODE.match(text, at):
                at = code.end()
                if code["letter"] == "A":
                    y = max(0, y - int(code["number"] or 1))
                elif code["letter"] == "K":
                    lines[y] = lines[y][:x] if code["number"] in ("", "0") else ""
                elif not code["private"]:
                    assert code["letter"] == "m", f"unknown: {code[0]!r}"
                continue
            char, at = text[at], at + 1
            if char == "\n":
                y, x = y + 1, 0
                lines += [""] * (y + 1 - len(lines))
            elif char == "\r":
                x = 0
            else:
                lines[y] = lines[y].ljust(x)[:x] + char + lines[y][x + 1 :]
                x += 1
                if x == self.width + 1:
                    self.wrapped.append(lines[y])
        return "\n".join(map(str.rstrip, lines)).rstrip("\n").split("\n")
