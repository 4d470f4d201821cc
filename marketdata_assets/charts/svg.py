"""Parts that all pictures share: the Markdown image, coordinates, the width of a text, a path."""

from __future__ import annotations

from base64 import b64encode
from urllib.parse import quote

BLUE, GREEN, RED = "#2a78d0", "#1a9c6b", "#d8434e"


def embed_image(name: str, svg: str) -> str:
    """Return the SVG as a Markdown image, percent-encoded or in base64, whichever is shorter."""
    plain, packed = quote(svg, safe="/:;,=<>"), b64encode(svg.encode()).decode()
    data = min(f",{plain}", f";base64,{packed}", key=len)
    return f"![{name}](data:image/svg+xml{data})"


def estimate_width(text: str) -> float:
    """Return the px that the text needs at most, at 11 px in any common font."""
    return sum(7.8 if letter.isupper() else 6.2 if letter.isalnum() else 3.8 for letter in text)


def format_px(value: float) -> str:
    """Write a coordinate in px, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def draw_path(path: str, color: str, width: float) -> str:
    """Return the element of a path; nothing for an empty one."""
    if not path:
        return ""
    return f"<path stroke='{color}' stroke-width='{format_px(width)}' d='{path}'/>"
