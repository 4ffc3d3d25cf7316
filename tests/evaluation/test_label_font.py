"""Fonts for labels: what they have, against the tables in their files, and what takes the place of what they lack."""

from __future__ import annotations

import pytest
from PIL import ImageFont

from funlora_hf.evaluation import label_font as module
from funlora_hf.evaluation.label_font import drawable, label_font


TTFont = pytest.importorskip("fontTools.ttLib").TTFont
SIZE = 18


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs a font with glyphs, squares of different sizes, for the characters given, and no other."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    monkeypatch.setattr(module, "FOLDERS", (str(tmp_path / "none"), str(tmp_path / "fonts")))
    module._installed.cache_clear()

    def square(side):
        pen = TTGlyphPen(None)
        for step, point in enumerate([(0, 0), (0, side), (side, side), (side, 0)]):
            (pen.lineTo if step else pen.moveTo)(point)
        pen.closePath()
        return pen.glyph()

    def install(name: str, characters: str) -> None:
        builder = FontBuilder(1000, isTTF=True)
        glyphs = {".notdef": square(900), **{f"g{ord(c):x}": square(100 + 7 * i) for i, c in enumerate(characters)}}
        builder.setupGlyphOrder(list(glyphs))
        builder.setupCharacterMap({ord(character): f"g{ord(character):x}" for character in characters})
        builder.setupGlyf(glyphs)
        builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
        builder.setupHorizontalHeader(ascent=900, descent=-100)
        builder.setupNameTable({"familyName": name, "styleName": "Regular"})
        builder.setupOS2()
        builder.setupPost()
        (tmp_path / "fonts" / "deep").mkdir(parents=True, exist_ok=True)
        builder.save(tmp_path / "fonts" / "deep" / f"{name}.ttf")
        module._installed.cache_clear()

    yield install
    module._installed.cache_clear()


@pytest.mark.parametrize("name", ["pillow's own", "DejaVuSans.ttf"])
def test_a_font_lacks_what_its_table_lacks(name):
    if name == "pillow's own":
        font = ImageFont.load_default(SIZE)
        font.path.seek(0)
    else:
        matplotlib = pytest.importorskip("matplotlib")
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", SIZE)
    table = TTFont(font.path).getBestCmap()
    for character in filter(str.isprintable, map(chr, [*range(0x21, 0x2000), *range(0x4E00, 0x4E80)])):
        assert (drawable(character, font) == character) == (ord(character) in table), hex(ord(character))


def test_characters_without_a_glyph_are_escaped(installed):
    labels = ["cat", "7 (\u732b)", "a\x1b[2J\u202eb\nc"]
    font = label_font(labels, SIZE)
    assert font.getname() == ImageFont.load_default(SIZE).getname()
    assert [drawable(label, font) for label in labels] == ["cat", r"7 (\u732b)", "a\\x1b[2J\\u202eb\nc"]


def test_an_installed_font_takes_over(installed, tmp_path):
    installed("Sans", "cat 7()\u732b")
    (tmp_path / "fonts" / "damaged.ttf").write_bytes(b"no font")
    font = label_font(["cat", "7 (\u732b)"], SIZE)
    assert font.getname()[0] == "Sans"
    assert drawable("7 (\u732b)", font) == "7 (\u732b)"
    # Not without need, and it has the most of what is asked for.
    assert label_font(["cat"], SIZE).getname() == ImageFont.load_default(SIZE).getname()
    installed("LongerNameOfSans", "\u72ac\u732b")
    font = label_font(["\u72ac\u732b", "\u9ce5"], SIZE)
    assert font.getname()[0] == "LongerNameOfSans"
    assert drawable("\u72ac\u9ce5", font) == "\u72ac\\u9ce5"
