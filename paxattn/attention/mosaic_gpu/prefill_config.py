"""Block sizes of the prefill kernel, and what it can serve.

Nothing here imports Mosaic GPU: the choice of an implementation asks for it on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu.config import SHARED_BYTES
from paxattn.quantized import SCALE_DTYPE

TILE = 128  # packed query rows (tokens x group) of a tile
SCALE_BYTES = SCALE_DTYPE.itemsize
# Of quantised pages. A fourth warpgroup widens them, which leaves ptxas 128 registers per thread; a
# product of 256 columns takes 158.
QUANTIZED_HEAD_DIMS = (64, 128)
_RESERVED_BYTES = 4 * 1024  # barriers, the log-sum-exp, reductions' scratch, alignment


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the prefill kernel is cut.

    Attributes:
        block_kv: KV tokens per step, a multiple of 64; page sizes divide it or are multiples of it.
        stages: blocks of K and of V in flight.
        wide: blocks of quantised K and V in 16 bits, beside those in flight; 0: of floats.
        num_ctas: thread blocks, of which one fits a multiprocessor. More of them than that take
            their turns as the hardware deals them.
    """

    block_kv: int = 128
    stages: int = 2
    wide: int = 0
    num_ctas: int = 132

    @property
    def places(self) -> int:
        """Blocks of K (and of V) that lie ready for the products."""
        return self.wide or self.stages

    def own_output(self, head_dim: int) -> bool:
        """Whether the result has shared memory of its own, so that the next queries come early."""
        return self._fits(2 * TILE, head_dim)

    def fits(self, head_dim: int) -> bool:
        """Whether queries and the rings of K and V fit in shared memory."""
        return self._fits(TILE, head_dim)

    def _fits(self, rows: int, head_dim: int) -> bool:
        needed = 2 * head_dim * (rows + 2 * self.places * self.block_kv) + _RESERVED_BYTES
        if self.wide:
            needed += 2 * self.stages * self.block_kv * (head_dim + SCALE_BYTES)
        return needed <= SHARED_BYTES


def default_config(*, head_dim: int, num_sms: int = 132, quantized: bool = False) -> Config:
    """FlashAttention-3's block sizes, as far as registers and shared memory allow.

    Args:
        head_dim: elements per head.
        num_sms: multiprocessors of the device.
        quantized: whether pages are.

    Returns:
        The config.
    """
    config = Config(block_kv=64 if head_dim > 128 else 128, num_ctas=num_sms)
    if not quantized:
        return config
    # Two wide blocks, so that one is made while the products read the other, come before a second
    # one in flight: of a single one, K is on its way while V is widened.
    config = replace(config, wide=2)
    return config if config.fits(head_dim) else replace(config, stages=1)


def why_not(request: Request) -> str:
    """What keeps the prefill kernel for Hopper from a request, or "" if nothing does."""
    if request.page_dtype is None:
        return ""
    if request.head_dim not in QUANTIZED_HEAD_DIMS:
        return (
            f"it reads quantised pages of head_dim {', '.join(map(str, QUANTIZED_HEAD_DIMS))} only"
        )
    if request.page_size < 16:  # (64 copies for a block spill the producer's registers)
        return "it reads quantised pages of 16 and more tokens only"
    return ""
