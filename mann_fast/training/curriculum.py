"""A curriculum: how much a run learns at once, little at first."""

from __future__ import annotations

from typing import Any

STEPS = 50  # in a row whose errors say whether it is learned


class Curriculum:
    """``first`` at once in the beginning, and twice as many, up to ``last``, each time that the errors of 50 steps in a row
    with as many are below ``learned`` on average (Rae et al. 2016, arXiv 1610.09027, section 4.3).

    Args:
        name: of what: "length" of sequences or "ways" of episodes. So a checkpoint calls it.
        first: 0 for ``last`` from the start.
    """

    def __init__(self, name: str, first: int, last: int, learned: float):
        self.name, self.now, self.last, self.learned = name, first or last, last, learned
        self._recent: list[float] = []  # errors with so many

    def note(self, error: float) -> None:
        """After a step."""
        if self.now == self.last:
            return
        self._recent = [*self._recent[1 - STEPS :], error]
        if len(self._recent) == STEPS and sum(self._recent) / STEPS < self.learned:
            self.now, self._recent = min(2 * self.now, self.last), []

    def state_dict(self) -> dict[str, Any]:
        return {self.name: self.now, "errors": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now, self._recent = state[self.name], list(state["errors"])
