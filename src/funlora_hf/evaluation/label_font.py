"""Choose a font for labels in any script, and replace characters that it lacks, so that no figure shows boxes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import cast

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont, Layout


# Where operating systems keep their fonts; each system has only some of these folders.
FOLDERS = (
    "~/.local/share/fonts",
    "~/.fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
    "C:/Windows/Fonts",
)
# No font has a glyph for this code point, so each font draws the box that it shows for missing characters.
_NOT_A_CHARACTER = "\uffff"


def label_font(labels: Iterable[str], size: int) -> FreeTypeFont:
    """Return Pillow's own font if it has all characters of the labels, else the installed font that lacks the fewest; size in pixels."""
    characters = frozenset("".join(labels))
    font = cast(FreeTypeFont, ImageFont.load_default(size))  # of another type without a size
    lacking = _lacking(font, characters)
    for path in _installed() if lacking else ():
        try:
            other = ImageFont.truetype(path, size)
        except OSError:  # damaged, or a bitmap font of another size
            continue
        if len(found := _lacking(other, characters)) < len(lacking):
            font, lacking = other, found
        if not lacking:
            break
    return font


def drawable(label: str, font: FreeTypeFont) -> str:
    r"""Return the label with Python's escape, such as `\u732b`, for each character that the font lacks or that is invisible.

    Line ends stay.
    """
    lacking = _lacking(font, frozenset(label))
    return "".join(
        character.encode("unicode_escape").decode() if character in lacking else character for character in label
    )


def _lacking(font: FreeTypeFont, characters: frozenset[str]) -> set[str]:
    if font.layout_engine != Layout.BASIC:
        # Raqm would draw a lone accent on a circle. Pillow 12's `font_variant` keeps the engine.
        font = FreeTypeFont(font.path, font.size, font.index, layout_engine=Layout.BASIC)
    box = _drawing(font, _NOT_A_CHARACTER)
    return {
        character
        for character in characters - {"\n", " "}
        if not character.isprintable() or _drawing(font, character) == box
    }


def _drawing(font: FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@cache
def _installed() -> list[Path]:
    """Return the fonts of this system, plain sans-serif ones first."""
    found = (path for folder in FOLDERS for path in Path(folder).expanduser().rglob("*"))
    fonts = [path for path in found if path.suffix.lower() in (".ttf", ".ttc", ".otf")]
    return sorted(fonts, key=lambda path: ("sans" not in path.stem.lower(), len(path.stem), path))
