"""The smallest decoder that the loops are tested with: what is tested is who holds which page."""

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
