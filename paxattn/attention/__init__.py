"""Paged attention: one public op, one implementation per machine."""

from paxattn.attention.api import (
    attention_schedule,
    explain,
    paged_attention,
    paged_attention_decode,
)
from paxattn.attention.choice import AttentionSchedule, Explanation, implementations

__all__ = [
    "AttentionSchedule",
    "Explanation",
    "attention_schedule",
    "explain",
    "implementations",
    "paged_attention",
    "paged_attention_decode",
]
