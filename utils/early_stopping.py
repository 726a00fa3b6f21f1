"""Stop a training that has not improved for a while."""

from __future__ import annotations

import math
from typing import Any


class EarlyStopping:
    """Watches one fitness value per epoch. ``patience``: epochs without improvement after which to stop; 0: never.

    ``best_epoch``, ``best_fitness``: the best so far (equal values do not replace an earlier best).
    ``possible_stop``: the next epoch may be the last, so it has to be validated in full.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience or math.inf
        self.best_fitness = -1.0
        self.best_epoch = 0
        self.possible_stop = False

    def update(self, epoch: int, fitness: float) -> bool:
        """Take note of an epoch's fitness; True when the training should stop."""
        if fitness > self.best_fitness:
            self.best_fitness, self.best_epoch = float(fitness), epoch
        waited = epoch - self.best_epoch
        self.possible_stop = waited >= self.patience - 1
        return self.has_ended(epoch + 1)

    def has_ended(self, epochs: int) -> bool:
        """Whether a training of so many epochs was, with this patience, at its end."""
        return epochs - 1 - self.best_epoch >= self.patience

    def message(self) -> str:
        """What to tell the user when it stops."""
        return (
            f"Stopping training early: no improvement in the last {self.patience} epochs. Best results at epoch "
            f"{self.best_epoch}, saved as best.pt. Change it with --patience N, or --patience 0 to train to the end."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint; the patience is not part of it, so that a resumed run may change it."""
        return {"best_fitness": self.best_fitness, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.best_fitness, self.best_epoch = float(state["best_fitness"]), int(state["best_epoch"])
