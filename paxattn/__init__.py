"""Paged attention for JAX: page table, paged KV cache, attention and decode loop inside jax.jit."""

__version__ = "0.1.0"
