"""The GPUs that there are kernels for, and what a kernel must know of one.

Nothing here imports Mosaic GPU: the choice of an implementation asks for it on any machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """A kind of GPU.

    Attributes:
        arch: the architecture, as compilers name it.
        num_sms: multiprocessors (a wrong number costs balance only).
        shared_bytes: shared memory of a multiprocessor that thread blocks can have between them; a
            single one can have 1 KiB less. The compiler does not check it.
        tma: whether copies to shared memory are TMA's, else `cp.async`.
    """

    arch: str
    num_sms: int
    shared_bytes: int
    tma: bool

    @property
    def hopper(self) -> bool:
        """Whether there are kernels for it alone; the portable ones serve what those do not."""
        return self.arch == "sm_90"

    @property
    def fp8(self) -> bool:
        """Whether it has instructions that convert fp8 numbers, as from Ada on."""
        return self.arch not in ("sm_80", "sm_86")


def _ampere(num_sms: int) -> Card:
    return Card(arch="sm_80", num_sms=num_sms, shared_bytes=164 * 1024, tma=False)


def _hopper(num_sms: int) -> Card:
    return Card(arch="sm_90", num_sms=num_sms, shared_bytes=228 * 1024, tma=True)


def _consumer(arch: str, num_sms: int, tma: bool = False) -> Card:
    return Card(arch=arch, num_sms=num_sms, shared_bytes=100 * 1024, tma=tma)


# By the maker's names of devices; the first that is found counts.
_CARDS = (
    (r"\b(A100|A800)\b", _ampere(108)),
    (r"\bA30\b", _ampere(56)),
    (r"\b(RTX 3090|RTX A6000|A40)\b", _consumer("sm_86", 84)),
    (r"\b(RTX 3080|A10G?|RTX A5000)\b", _consumer("sm_86", 72)),
    (r"\b(RTX 30\d\d|RTX A\d000|A16|A2)\b", _consumer("sm_86", 46)),
    (r"\bRTX 4090\b", _consumer("sm_89", 128)),
    (r"\b(L40S?|RTX 6000 Ada)\b", _consumer("sm_89", 142)),
    (r"\b(RTX 4080|L4)\b", _consumer("sm_89", 76)),
    (r"\b(RTX 40\d\d|RTX \d000 Ada)\b", _consumer("sm_89", 46)),
    (r"\bH100 PCIe\b", _hopper(114)),
    (r"\bH20\b", _hopper(78)),
    (r"\b(GH200|H200|H100|H800)\b", _hopper(132)),
    (r"\b(B200|GB200|B100)\b", Card(arch="sm_100", num_sms=148, shared_bytes=228 * 1024, tma=True)),
    (r"\bRTX PRO 6000 Blackwell\b", _consumer("sm_120", 188, tma=True)),
    (r"\bRTX 5090\b", _consumer("sm_120", 170, tma=True)),
    (r"\b(RTX 50\d\d|RTX PRO \d000 Blackwell)\b", _consumer("sm_120", 84, tma=True)),
)
_OLDER = re.compile(r"\b(T4|V100|P100|P40|P4|K80|M60|GTX|RTX 20[678]0|TITAN|Quadro)\b")


def card_of(device_kind: str) -> Card | None:
    """Finds what is known of a device.

    Args:
        device_kind: the maker's name of it.

    Returns:
        The card, or None for one that is not known, or is too old.
    """
    if is_older(device_kind):  # (of the Quadro RTX 4000, a part is the name of an Ada card)
        return None
    return next((card for name, card in _CARDS if re.search(name, device_kind)), None)


def is_older(device_kind: str) -> bool:
    """Whether a device is known to be older than Ampere."""
    return bool(_OLDER.search(device_kind))
