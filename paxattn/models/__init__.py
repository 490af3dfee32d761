"""The decoder, its configuration and the reading of Hugging Face checkpoints."""

from paxattn.models.checkpoint import Checkpoint, GenerationConfig, bundled, load
from paxattn.models.config import CheckpointError, DecoderConfig
from paxattn.models.decoder import Decoder

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Decoder",
    "DecoderConfig",
    "GenerationConfig",
    "bundled",
    "load",
]
