"""Loading a decoder from a Hugging Face checkpoint: a directory, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike
from tokenizers import Tokenizer

from paxattn.models.assemble import Progress, read_model
from paxattn.models.config import read_config
from paxattn.models.decoder import Decoder
from paxattn.models.decoder_config import DecoderConfig
from paxattn.models.fields import CheckpointError, read_json
from paxattn.models.tensors import TensorFiles

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors*",
]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What the checkpoint's makers recommend for generating.

    Attributes:
        eos_ids: tokens that end a text; empty if none is known.
        do_sample: sample rather than take the most likely token.
        temperature: None where the checkpoint says nothing, here and below.
        top_k: keep the most likely tokens only.
        top_p: keep the smallest set with this probability.
        min_p: keep tokens this likely, relative to the likeliest.
        repetition_penalty: divisor of repeated tokens' logits.
    """

    eos_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def sampling(self) -> dict[str, float]:
        """What `SamplingParams` takes for that, apart from a seed."""
        recommended = {"repetition_penalty": self.repetition_penalty}
        if self.do_sample:
            recommended["temperature"] = 1.0 if self.temperature is None else self.temperature
            recommended |= {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return {name: value for name, value in recommended.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: the decoder with its weights.
        config: its shape, also ``model.config``.
        tokenizer: None if the directory has no tokenizer.json.
        generation_config: the makers' recommendations.
        directory: where it was loaded from.
    """

    model: Decoder
    config: DecoderConfig
    tokenizer: Tokenizer | None
    generation_config: GenerationConfig
    directory: Path

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of ``generation_config.eos_ids`` that there are."""
        return tuple(i for i in self.generation_config.eos_ids if i < self.config.vocab_size)


def bundled() -> Path:
    """Directory of the small checkpoint that comes with the package."""
    return Path(__file__).parent.parent / "checkpoints" / "tiny_python"


def load(
    path: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    stacked: bool | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Load a Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text) or gpt-oss checkpoint.

    Arrays are read and converted one at a time; there is never a second copy of the model.

    Args:
        path: a directory with config.json, model.safetensors (or an index and shards) and, if it
            has them, tokenizer.json and generation_config.json; or a hub id such as
            ``"Qwen/Qwen3-0.6B"``, fetched by ``huggingface_hub`` if that is installed.
        dtype: of the weights: f32, bf16 or f16. By default what config.json says, or else what the
            embedding is stored in.
        stacked: how the layers' matrices are stored; see `Decoder`.
        progress: called as arrays are read, as ``progress(bytes_read, bytes_total)``.

    Raises:
        CheckpointError: something is missing, damaged, mis-shaped or not supported; one line that
            names it and says what to do.
    """
    directory = _directory(path)
    config = read_config(directory)
    tokenizer = _read_tokenizer(directory, config.vocab_size)
    generation_config = _read_generation_config(directory)
    with TensorFiles(directory) as files:
        model = read_model(files, config, dtype, stacked, progress)
    return Checkpoint(
        model=model,
        config=config,
        tokenizer=tokenizer,
        generation_config=generation_config,
        directory=directory,
    )


def _directory(path: str | PathLike[str]) -> Path:
    """The checkpoint's directory; a hub id is fetched."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{path=} must be a directory or a hub id")
    try:
        directory = Path(path).expanduser()
        if directory.is_dir():
            return directory
        if directory.exists():
            raise CheckpointError(f"{path}: is a file; pass the directory that holds config.json")
    except (OSError, RuntimeError) as error:  # too long a name, no permission, an unknown ~user
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: no such directory ({reason})") from None
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise CheckpointError(
            f"{path}: no such directory (an id on the Hugging Face hub reads owner/name)"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{path}: no such directory; to fetch it from the Hugging Face hub install "
            "huggingface_hub (pip install 'paxattn[hub]'), or pass a local directory"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub, its HTTP library and the network each have their own
        lines = str(error).strip().splitlines() or [""]
        raise CheckpointError(
            f"{path}: no such directory, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {lines[0]}); pass a local directory"
        ) from None


def _read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer ({error}); fetch the file again") from None
    # As in transformers: what the file says about batches for training would cut prompts short.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Added tokens may be beyond (a padding token that the model never sees): as long as no prompt
    # has one, that is no harm.
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    token, last = max(vocab.items(), key=lambda item: item[1], default=("", -1))
    if last >= vocab_size:
        raise CheckpointError(
            f"{path}: has token ids up to {last} ({token!r}), but config.json says vocab_size="
            f"{vocab_size}; use the tokenizer that this model was trained with"
        )
    return tokenizer


def _read_generation_config(directory: Path) -> GenerationConfig:
    """From generation_config.json; token ids that it lacks from config.json."""
    path = directory / "generation_config.json"
    fields = read_json(path) if path.is_file() else {}
    base = read_json(directory / "config.json")
    if isinstance(base.get("text_config"), dict):
        base = {**base["text_config"], **base}

    def look_up(key: str) -> tuple[Any, Path]:
        return (fields[key], path) if key in fields else (base.get(key), directory / "config.json")

    def token_ids(key: str) -> tuple[int, ...]:
        value, source = look_up(key)
        # -1 means none in checkpoints of old.
        ids = [] if value in (None, -1) else value if isinstance(value, list) else [value]
        if any(type(one) is not int or not 0 <= one < 2**31 for one in ids):
            raise CheckpointError(f"{source}: {key}={value!r} must be token ids")
        return tuple(ids)

    def number(key: str, kinds: Any) -> Any:
        value = fields.get(key)
        if value is None:
            return None
        # Python's JSON reads NaN and Infinity.
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) < 2**31:
            raise CheckpointError(f"{path}: {key}={value!r} must be a number")
        return value

    return GenerationConfig(
        eos_ids=token_ids("eos_token_id"),
        do_sample=fields.get("do_sample") is True,
        temperature=number("temperature", (int, float)),
        top_k=number("top_k", int),
        top_p=number("top_p", (int, float)),
        min_p=number("min_p", (int, float)),
        repetition_penalty=number("repetition_penalty", (int, float)),
    )
