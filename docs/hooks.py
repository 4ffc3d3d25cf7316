"""What mkdocs calls for each page: formulas are drawn by matplotlib, since a script that draws them in the browser would have to be loaded
from elsewhere, and types in docstrings lose their marks."""

import base64
import html
import io
import re

from matplotlib import rcParams
from matplotlib.figure import Figure


rcParams["mathtext.fontset"] = "cm"
_BLOCK = re.compile(r"^( *)```math\n(.*?)\n *```$", re.MULTILINE | re.DOTALL)
# Not in code, and not a sum of money.
_INLINE = re.compile(r"(`[^`]*`)|\$([^\s$](?:[^$\n]*[^\s$])?)\$")
_TYPE = re.compile(r"(<td>\s*<code>)([^<]*)(?=</code>)")


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Replace the formulas of a page by pictures; mkdocs calls this for each page."""
    parts = re.split(r"(^ *```.*?^ *```$)", _BLOCK.sub(_centred, markdown), flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.lstrip().startswith("```") else _INLINE.sub(_inline, part) for part in parts)


def on_page_content(content: str, **kwargs: object) -> str:
    """Show "[`Strategy`], *optional*" in docstrings, which PEFT and diffusers write so too, as "Strategy, optional"."""
    content = _TYPE.sub(lambda match: match[1] + re.sub(r"\[?`([^`]*)`\]?|\*(\w+)\*", r"\1\2", match[2]), content)
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", content)


def _centred(match: re.Match) -> str:
    return f'{match[1]}<p style="text-align: center">{_picture(" ".join(match[2].split()))}</p>'


def _inline(match: re.Match) -> str:
    return match[1] or _picture(match[2])


def _picture(formula: str) -> str:
    figure = Figure()
    figure.text(0, 0, f"${formula}$", fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.02, transparent=True)
    height = re.search(rb'height="([\d.]+)pt"', file.getvalue())[1]
    source = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img class="formula" alt="{html.escape(formula)}" style="vertical-align: middle; height: {float(height) / 11:.2f}em" '
        f'src="data:image/svg+xml;base64,{source}">'
    )
