"""One row of the table of faults, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """``name`` of the fault; exit ``status`` and the ``line`` that was said about it; ``seconds`` and peak
    ``megabytes`` of the process (0: not measured). ``broken``: promises that did not hold, empty when all did."""

    name: str
    status: int
    line: str
    seconds: float
    megabytes: int
    broken: tuple[str, ...] = ()

    def row(self) -> str:
        """The row of a Markdown table."""
        line = self.line if len(self.line) <= 160 else f"{self.line[:157]}..."
        held = "; ".join(self.broken) or "held"
        cells = (self.name, held, str(self.status), f"`{line.strip()}`", f"{self.seconds:.1f}", f"{self.megabytes:,}")
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


HEADER = "| fault | promises | exit | what is said | s | MB |\n|---|---|---|---|---|---|"
