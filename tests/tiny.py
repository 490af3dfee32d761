"""The smallest decoder that the loops are tested with: what is tested is who holds which page."""

import jax

from paxattn.models import DecoderConfig


def tiny_config(*, vocab_size, max_positions):
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=max_positions,
    )


def committed(state):
    """A server's state on its device, as pages that come back from the host make it.

    `jax.jit` compiles anew where arguments differ in that.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), state)
