"""Paged attention: one public op, one implementation per machine."""

from paxattn.attention.api import explain, paged_attention, paged_attention_decode
from paxattn.attention.choice import Explanation, implementations

__all__ = [
    "Explanation",
    "explain",
    "implementations",
    "paged_attention",
    "paged_attention_decode",
]
