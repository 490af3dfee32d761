"""Block sizes of the prefill kernel, and what it can serve.

Nothing here imports Mosaic GPU: the choice of an implementation asks for it on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from paxattn.attention.checks import Request
from paxattn.attention.mosaic_gpu.config import DTYPES, HEAD_DIMS, SHARED_BYTES

TILE = 128  # packed query rows (tokens x group) of a tile
_RESERVED_BYTES = 4 * 1024  # barriers, the log-sum-exp, reductions' scratch, alignment


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the prefill kernel is cut.

    Attributes:
        block_kv: KV tokens per step, a multiple of 64; page sizes divide it or are multiples of it.
        stages: blocks of K and of V in flight.
        num_ctas: thread blocks, of which one fits a multiprocessor. More of them than that take
            their turns as the hardware deals them.
    """

    block_kv: int = 128
    stages: int = 2
    num_ctas: int = 132

    def own_output(self, head_dim: int) -> bool:
        """Whether the result has shared memory of its own, so that the next queries come early."""
        return self._fits(2 * TILE, head_dim)

    def fits(self, head_dim: int) -> bool:
        """Whether queries and the rings of K and V fit in shared memory."""
        return self._fits(TILE, head_dim)

    def _fits(self, rows: int, head_dim: int) -> bool:
        rows += 2 * self.stages * self.block_kv
        return rows * head_dim * 2 + _RESERVED_BYTES <= SHARED_BYTES


def default_config(*, head_dim: int, num_sms: int = 132) -> Config:
    """FlashAttention-3's block sizes, as far as registers and shared memory allow.

    Args:
        head_dim: elements per head.
        num_sms: multiprocessors of the device.

    Returns:
        The config.
    """
    return Config(block_kv=64 if head_dim > 128 else 128, num_ctas=num_sms)


def check(request: Request, config: Config | None = None) -> str:
    """Tells whether the prefill kernel can serve.

    Args:
        request: what is asked.
        config: block sizes; None: `default_config`.

    Returns:
        Why it can.

    Raises:
        NotImplementedError: it cannot; the message says why.
    """
    if request.dtype not in DTYPES:
        raise NotImplementedError(f"dtype {request.dtype}: the tensor cores take bfloat16, float16")
    if request.head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={request.head_dim}: must be one of {HEAD_DIMS}")
    config = config or default_config(head_dim=request.head_dim)
    page, block = request.page_size, config.block_kv
    if page % 8 or (page % block and block % page):
        raise NotImplementedError(
            f"page_size={page}: must be a multiple of 8 that divides {block} or is a multiple of it"
        )
    return "the prefill kernel serves this"
