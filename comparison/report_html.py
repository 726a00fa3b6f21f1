"""report.html: one file that needs nothing else, neither scripts nor the network. Every text in it is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from comparison.charts import colour, curve_chart, difference_chart
from comparison.report import LEGEND, Comparison, Example, Table, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; margin: .5em 0 } th, td { padding: .25em .8em; border-bottom: 1px solid #ddd }
th { text-align: left; background: #f4f4f4 } td { font-variant-numeric: tabular-nums; white-space: nowrap }
.wide { overflow-x: auto } .note { color: #666; font-size: .9em; max-width: 50em }
.verdict { font-size: 1.1em; border-left: 5px solid #888; padding: .4em .8em; margin: .5em 0; background: #f7f7f7 }
.worth { border-color: #3f8f4f } .loses { border-color: #b03a48 } .warning { color: #b03a48 }
svg { max-width: 760px; width: 100%; display: block } svg text { font: 12px system-ui, sans-serif; fill: #444 }
.key span { margin-right: 1.5em; white-space: nowrap }
.key i { display: inline-block; width: .9em; height: .9em; margin-right: .4em; vertical-align: -.1em }
.pictures { display: flex; gap: 8px; overflow-x: auto }
figure { margin: 0 } figure img { display: block; height: 260px }
.offsets figure img { height: auto; max-width: 100% }
figcaption { font-size: .85em; color: #444 }
"""

# belt and braces: were anything not escaped, a browser would still load and run nothing
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(result: Comparison) -> str:
    """The whole report as HTML."""
    title = " against ".join(reversed(result.models))
    body = [_tag("h1", title)]
    body += [f'<p class="verdict {verdict.kind}">{escape(verdict.text)}</p>' for verdict in result.verdicts]
    body += [f'<p class="warning">{escape(line)}</p>' for line in result.warnings]
    body += [f'<p class="note">{"<br>".join(escape(line) for line in result.setting)}</p>', _note(LEGEND)]
    body += [_tag("h2", "Learning: mAP50-95 on val after each epoch"), _key(result.models), curve_chart(result.curves)]
    for model in result.models[1:]:
        split = result.splits[-1].split
        body += [_tag("h2", f"{model} less {result.models[0]}, mAP50-95 on {split}"), difference_chart(result, model)]
        body.append(_note("Dots with 95 % intervals; a dashed one holds the images' part alone."))
    found = tables(result)
    body += [_table(table) for table in found]
    body += _examples(result.examples)
    body += _offsets(result.offsets)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _key(models: Sequence[str]) -> str:
    """Which colour is which model. The thin lines are its seeds."""
    marks = (f'<span><i style="background:{colour(i)}"></i>{escape(name)}</span>' for i, name in enumerate(models))
    return f'<p class="key">{"".join(marks)}<span class="note">thick: mean, thin: each seed</span></p>'


def _table(table: Table) -> str:
    head = _cells("th", table.header)
    rows = "\n".join(_cells("td", row) for row in table.rows)
    notes = "".join(_note(note) for note in table.notes)
    return f'{_tag("h2", table.title)}\n<div class="wide"><table>{head}\n{rows}</table></div>{notes}'


def _cells(tag: str, texts: Iterable[str]) -> str:
    return f"<tr>{''.join(_tag(tag, text) for text in texts)}</tr>"


def _examples(examples: Sequence[Example]) -> list[str]:
    if not examples:
        return []
    parts = [
        _tag("h2", "Examples"),
        _note(
            "The images where the others are furthest ahead of the first model, then those where they are furthest "
            "behind it (or least ahead), by F1 at IoU 0.5; the first seed, confidence 0.25 and more."
        ),
    ]
    for example in examples:
        pictures = "".join(_figure(caption, jpeg) for caption, jpeg in example.pictures)
        parts.append(f'{_note(example.title)}<div class="pictures">{pictures}</div>')
    return parts


def _offsets(pictures: Sequence[tuple[str, bytes]]) -> list[str]:
    if not pictures:
        return []
    how = (
        "For the surest objects of an example image: points where each DCN layer samples (large and yellow: full "
        "weight), crosses where a plain convolution would, and what the last layer sees (docs/dcn.md)."
    )
    figures = (f'<div class="offsets">{_figure(caption, jpeg)}</div>' for caption, jpeg in pictures)
    return [_tag("h2", "Where the DCN layers sample"), _note(how), *figures]


def _figure(caption: str, jpeg: bytes) -> str:
    data = base64.b64encode(jpeg).decode("ascii")
    image = f'<img alt="{escape(caption)}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
