"""report.md and report.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence

from comparison.findings import Score
from comparison.report import LEGEND, Comparison, Table, tables
from utils.safe_names import spreadsheet_text


def markdown(result: Comparison) -> str:
    """The whole report but its pictures."""
    lines = [f"# {_escaped(' against '.join(reversed(result.models)))}", ""]
    lines += [f"- **{_escaped(verdict.text)}**" for verdict in result.verdicts]
    lines += [f"- {_escaped(line)}" for line in result.warnings]
    lines += ["", *(f"{_escaped(line)}  " for line in result.setting), "", LEGEND]
    return "\n".join([*lines, *(_table(table) for table in tables(result))]) + "\n"


def _table(table: Table) -> str:
    cells = [table.header, ["---"] * len(table.header), *table.rows]
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in cells]
    return "\n".join(["", f"## {_escaped(table.title)}", *lines, *(f"\n{_escaped(note)}" for note in table.notes)])


_SIGNS = str.maketrans({"|": r"\|", "<": "&lt;", ">": "&gt;", "&": "&amp;", "*": r"\*", "`": r"\`", "[": r"\["})


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: names come from files."""
    return text.translate(_SIGNS)


CSV_HEADER = (
    ("split", "part", "name", "boxes", "model", "seed", "mAP50", "mAP50_pm", "mAP50-95", "mAP50-95_pm")
    + ("difference", "difference_pm", "difference_pm_seeds", "difference_pm_images")
    + ("train_seconds", "inference_ms", "memory_gb", "params", "gflops")
)  # fmt: skip


def table_csv(result: Comparison) -> str:
    """One line for each split, part of the labels and model, with the mean over seeds; for all labels also one a seed.

    Points; ``_pm`` are half widths of 95 % intervals. Cells are empty where there is no value.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for line in _lines(result):
        writer.writerow([_cell(value) for value in line])
    return out.getvalue()


def _lines(result: Comparison) -> Iterator[Sequence[object]]:
    for split in result.splits:
        for row in split.rows:
            for model, score in row.scores.items():
                start = (split.split, row.kind, row.name, row.labels, model)
                cost = result.costs[model]
                shared = (cost.inference_ms, cost.memory_gb, cost.params, cost.gflops)
                costs = (cost.train_time, *shared) if row.kind == "all" else ()
                yield *start, "mean", *_numbers(score), *costs
                for number, (map50, value) in enumerate(score.by_seed if row.kind == "all" else ()):
                    blank = (None,) * 5
                    yield *start, result.seeds[model][number], map50, None, value, *blank, cost.train_seconds[number]


def _numbers(score: Score) -> list[float | None]:
    numbers = [score.map50.mean, score.map50.half, score.map.mean, score.map.half]
    gain = score.gain
    return numbers + ([None] * 4 if gain is None else [gain.mean, gain.half, gain.seeds_half, gain.images_half])


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else spreadsheet_text(value) if isinstance(value, str) else value
