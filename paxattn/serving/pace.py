"""How many device steps make a block, so that tokens are handed over about every 100 ms."""

from __future__ import annotations

BLOCK_SECONDS = 0.1
# What a step is thought to take is never less than this part of what it was thought to take before:
# steps that store prompts take many times longer than others, and come in bursts.
_FADE = 0.8


class Pace:
    """Learns from each block how many steps the next one may have.

    The number of steps is data, so a block of another length compiles nothing. Blocks in which
    prompts are being stored are judged by their like: a step that stores takes longer.
    """

    def __init__(self, most: int) -> None:
        """``most``: steps in a block."""
        self._most = most
        self._compiled = False
        self._per_step: dict[bool, float] = {}

    def steps(self, storing: bool) -> int:
        """How many steps the next block should have.

        Args:
            storing: whether prompts will be stored in it.
        """
        per_step = self._per_step.get(storing, BLOCK_SECONDS)
        return max(1, min(self._most, int(BLOCK_SECONDS / per_step)))

    def took(self, storing: bool, steps: int, seconds: float) -> None:
        """Take note of a block that has run.

        Args:
            storing: what `steps` was told.
            steps: how many it ran, maybe none.
            seconds: how long it took.
        """
        if not self._compiled:  # the first one's time was the compiler's
            self._compiled = True
        elif steps:
            least = _FADE * self._per_step.get(storing, 0.0)
            self._per_step[storing] = max(seconds / steps, least, 1e-6)
