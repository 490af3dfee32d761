"""What a decoder looks like: plain data, whatever format it was read from."""

from __future__ import annotations

from dataclasses import dataclass

from paxattn.rope import Rope

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of each layer's MLP.

    Attributes:
        num_experts: experts per layer.
        per_token: how many of them each token goes to; the softmax is over these.
        alpha: an expert computes ``(up + 1) * gate * sigmoid(alpha * gate)``,
        limit: with ``gate`` clamped from above and ``up`` from both sides.
    """

    num_experts: int
    per_token: int
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        num_experts, per_token = self.num_experts, self.per_token
        if not 0 < per_token <= num_experts < 2**31:
            raise ValueError(f"{per_token=} must be between 1 and {num_experts=}")
        if not self.alpha > 0 or not self.limit > 0:
            raise ValueError(f"alpha={self.alpha} and limit={self.limit} must be positive")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape and options of a `Decoder`. Static: plain hashable data, safe as a jit constant.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the MLP, or inside each expert.
        num_layers: layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: elements per head (not always ``hidden_size / num_heads``).
        max_positions: tokens per sequence that the model was made for.
        norm_eps: added to the mean square in RMSNorm.
        rope: rotary embedding.
        local_rope: that of layers with a window, where it is another.
        tie_embeddings: the output head is the embedding.
        scale_embeddings: tokens' embeddings are multiplied by ``sqrt(hidden_size)``.
        qkv_bias: query, key and value projections have a bias.
        o_bias: the attention's output projection has one.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        out_norms: what attention and MLP give is RMS-normalised, too, before it is added.
        windows: sliding window per layer in tokens, 0 for full attention; empty for none at all.
        sm_scale: factor on the attention scores; None: ``head_dim ** -0.5``.
        soft_cap: attention scores become ``soft_cap * tanh(scores / soft_cap)``.
        sinks: each query head has one more logit in its softmax's denominator.
        activation: of the MLP's gate, ``"silu"`` or ``"gelu_tanh"``.
        experts: a mixture of experts in place of the MLP.
        final_soft_cap: the same as ``soft_cap``, of the logits.
        dtype: dtype the weights are meant to have, as ``config.json`` says; None if it does not.
        family: the ``model_type`` it came from, for messages.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-6
    rope: Rope = Rope()  # noqa: RUF009 (frozen)
    local_rope: Rope | None = None
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    out_norms: bool = False
    windows: tuple[int, ...] = ()
    sm_scale: float | None = None
    soft_cap: float | None = None
    sinks: bool = False
    activation: str = "silu"
    experts: Experts | None = None
    final_soft_cap: float | None = None
    dtype: str | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads"
        for name in f"{sizes} head_dim max_positions".split():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise ValueError(f"{name}={value!r} must be a positive integer below 2**31")
        num_heads, num_kv_heads, head_dim = self.num_heads, self.num_kv_heads, self.head_dim
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        if head_dim % 2:
            raise ValueError(f"{head_dim=} must be even: rotary embedding rotates pairs")
        windows, num_layers = self.windows, self.num_layers
        if windows and len(windows) != num_layers:
            raise ValueError(f"{len(windows)=} must be 0 or {num_layers=}")
        if not all(0 <= window < 2**31 for window in windows):
            raise ValueError(f"{windows=} must be below 2**31 and not negative; 0: full attention")
        for name in ("sm_scale", "soft_cap", "final_soft_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be positive, or None")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} is not known; known: {', '.join(ACTIVATIONS)}"
            )
