"""The decoder, its configuration and the reading of Hugging Face checkpoints."""

from paxattn.models.checkpoint import Checkpoint, GenerationConfig, bundled, load
from paxattn.models.decoder import Decoder
from paxattn.models.decoder_config import DecoderConfig, Experts
from paxattn.models.fields import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Decoder",
    "DecoderConfig",
    "Experts",
    "GenerationConfig",
    "bundled",
    "load",
]
