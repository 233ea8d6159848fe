"""One self-contained HTML page: nothing is fetched, and nothing that came from a file is markup.

The page's own policy forbids all network, and every script but those whose hash it names.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from os import PathLike
from typing import Any

from organfast.files import written_whole

__all__ = ["asset", "data_block", "niivue", "page", "picture", "table", "text", "write_page"]

DISCLAIMER = "For research use only, not a medical device"


def text(value: object) -> str:
    """A value as the text of a page or of an attribute: no markup, nothing that cannot be seen.

    Parameters
    ----------
    value : object
        Made a str.
    """
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape(plain, quote=True)


def asset(name: str) -> str:
    """A text file that is shipped for pages.

    Parameters
    ----------
    name : str
        Of a file in ``organfast/assets``.
    """
    return (files("organfast") / "assets" / name).read_text("utf-8")


def niivue() -> str:
    """The viewer's script, as ``tools/vendor_niivue.py`` fetched it."""
    record = json.loads(asset("niivue.json"))
    packed = files("organfast") / "assets" / f"niivue-{record['version']}.umd.js.gz"
    return gzip.decompress(packed.read_bytes()).decode("utf-8")


def data_block(name: str, content: Any) -> str:
    """Data for the page's scripts: bytes as base64, all else as JSON that holds no ``<``.

    Parameters
    ----------
    name : str
        Its id.
    content : bytes or JSON
        What it holds.
    """
    if isinstance(content, bytes):
        kind, body = "application/octet-stream", base64.b64encode(content).decode("ascii")
    else:
        kind = "application/json"
        body = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="{kind}" id="{text(name)}">{body}</script>'


def picture(png: bytes, alt: str) -> str:
    """A picture that is part of the page.

    Parameters
    ----------
    png : bytes
        The file.
    alt : str
        What it shows, any text.
    """
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{encoded}" alt="{text(alt)}">'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table; cells are markup already, the first of a row is its head.

    Parameters
    ----------
    heads : sequence of str
        Of the columns.
    rows : sequence of sequence of str
        As many cells each.
    kind : str
        Its class.
    """
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="table"><table class="{kind}">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def page(title: str, body: str, scripts: Sequence[str], data: Mapping[str, Any]) -> str:
    """The whole page.

    Parameters
    ----------
    title : str
        Any text.
    body : str
        Markup.
    scripts : sequence of str
        Run in this order once the body is there.
    data : mapping of str to bytes or JSON
        Found by the scripts under these ids.
    """
    style = asset("page.css")
    allowed = " ".join(_hash(script) for script in scripts) or "'none'"
    # WebAssembly stays forbidden, too: NiiVue needs it for formats that no page holds.
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style></head><body>",
            body,
            *(data_block(name, content) for name, content in data.items()),
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def write_page(content: str, path: str | PathLike[str]) -> None:
    """Write a page, whole or not at all.

    Parameters
    ----------
    content : str
        Of :func:`page`.
    path : str or PathLike
        File to write; replaced if it is there.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    with written_whole(path) as beside:
        beside.write_text(content, encoding="utf-8")
