"""Paged attention for JAX: page table, paged KV cache, attention and decode loop inside jax.jit.

The names below are the public ones. The steps of the page table and of the cache are plain
functions in `paxattn.page_table` and `paxattn.kv_cache`.
"""

from paxattn import kv_cache, page_table
from paxattn.attention import explain, paged_attention, paged_attention_decode
from paxattn.decode_step import DecodeState, Status
from paxattn.generate import Stream, generate, stream
from paxattn.kept_pool import KeptPool
from paxattn.kv_cache import KVCache, init_kv_cache
from paxattn.memory import plan
from paxattn.models import Checkpoint, CheckpointError, Decoder, DecoderConfig, bundled, load
from paxattn.nn import PagedAttention
from paxattn.page_table import PageTable, init_page_table
from paxattn.pool import Pool, init_pool
from paxattn.ragged import RaggedBatch, ragged_batch
from paxattn.requests import GenerateOptions
from paxattn.results import Completion, Delta, Generation
from paxattn.sampling import SamplingParams
from paxattn.serving import AsyncEngine, Engine, QueueFull, RequestOptions
from paxattn.speculative import DraftModel, NGram
from paxattn.step import ragged_step

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "Checkpoint",
    "CheckpointError",
    "Completion",
    "DecodeState",
    "Decoder",
    "DecoderConfig",
    "Delta",
    "DraftModel",
    "Engine",
    "GenerateOptions",
    "Generation",
    "KVCache",
    "KeptPool",
    "NGram",
    "PageTable",
    "PagedAttention",
    "Pool",
    "QueueFull",
    "RaggedBatch",
    "RequestOptions",
    "SamplingParams",
    "Status",
    "Stream",
    "bundled",
    "explain",
    "generate",
    "init_kv_cache",
    "init_page_table",
    "init_pool",
    "kv_cache",
    "load",
    "page_table",
    "paged_attention",
    "paged_attention_decode",
    "plan",
    "ragged_batch",
    "ragged_step",
    "stream",
]
