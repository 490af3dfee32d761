"""From logits to tokens: greedy, temperature, top-k, top-p, min-p and penalties.

Every parameter is data, one value per row, so rows with different settings share a step and
changing a setting compiles nothing. What no row asks for is skipped at run time. Filters find
their threshold by bisection over the bits of the float instead of sorting the vocabulary: exact,
and a fixed number of cheap passes on any platform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxattn.penalties import any_penalty, penalize

_LIMITS = np.finfo(np.float32)
# What can be divided by: beyond, a float32 or its reciprocal (XLA may multiply by it) is subnormal,
# and so taken for 0, or infinite.
_SMALLEST, _LARGEST = float(_LIMITS.tiny), 1 / float(_LIMITS.tiny)

LogitsProcessor = Callable[[jax.Array, jax.Array], jax.Array]
"""``(logits f32[n, V], num_generated i32[n]) -> f32[n, V]``, traceable; runs before the rest.

There is a line for each token asked about: one per row, with speculation several."""

Counts = Callable[[], jax.Array]
"""Gives the counts i32[n, V] that penalties go by; not called where there are none."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the ``top_k`` most likely tokens (ties with the last of them too); 0: all.
        top_p: keep the smallest set of most likely tokens with at least this probability; 1: all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0: all.
        repetition_penalty: logits of tokens already in the sequence are divided (if positive) or
            multiplied (if negative) by it; 1: off (Keskar et al., 2019, arXiv:1909.05858).
        frequency_penalty: taken from a token's logit for each time that it was generated; 0: off.
        presence_penalty: taken from the logits of all tokens that were generated; 0: off.
        seed: the request's own random stream; the same seed gives the same tokens whatever else
            is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def validate(self) -> None:
        """Check the ranges.

        Raises:
            TypeError: a value is not a number, or not a whole one where it must be.
            ValueError: a value is outside its range; both name it and the range.
        """
        normal = f"(from {_SMALLEST:.3g} to {_LARGEST:.3g})"
        ranges: dict[str, tuple[type, Callable[[Any], bool], str]] = {
            "temperature": (
                Real,
                lambda x: x == 0 or _SMALLEST <= x <= _LARGEST,
                f"0 (greedy) or a positive number {normal}",
            ),
            "top_k": (Integral, lambda x: 0 <= x < 2**31, "an integer in 0..2**31-1"),
            "top_p": (Real, lambda x: 0 < x <= 1, "a number in (0, 1]"),
            "min_p": (Real, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
            "repetition_penalty": (
                Real,
                lambda x: _SMALLEST <= x <= _LARGEST,
                f"a positive number {normal}",
            ),
            **dict.fromkeys(
                ("frequency_penalty", "presence_penalty"),
                (Real, lambda x: abs(x) <= 1e6, "a number from -1e6 to 1e6"),
            ),
            "seed": (Integral, lambda x: 0 <= x < 2**32, "an integer in 0..2**32-1"),
        }
        for name, (kind, inside, wanted) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TypeError(f"{name}={value!r} must be {wanted}")
            if not inside(value):
                raise ValueError(f"{name}={value!r} must be {wanted}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """`SamplingParams` of R rows, on the device.

    Attributes:
        temperature: f32[R].
        top_k: i32[R].
        top_p: f32[R].
        min_p: f32[R].
        repetition_penalty: f32[R].
        frequency_penalty: f32[R].
        presence_penalty: f32[R].
        seed: u32[R].
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    seed: jax.Array


_DTYPES = {"top_k": np.int32, "seed": np.uint32}


def row_sampling(params: Sequence[SamplingParams], num_rows: int) -> RowSampling:
    """Stack requests' parameters; rows beyond them get the defaults.

    Args:
        params: at most ``num_rows`` of them.
        num_rows: R.

    Raises:
        TypeError: a parameter is not a number.
        ValueError: a parameter is out of range, or there are more requests than rows.
    """
    if len(params) > num_rows:
        raise ValueError(f"{len(params)} requests do not fit {num_rows=}")
    for one in params:
        one.validate()
    padded = [*params, *[SamplingParams()] * (num_rows - len(params))]
    columns = {
        f.name: jnp.asarray(
            np.array([getattr(p, f.name) for p in padded], _DTYPES.get(f.name, np.float32))
        )
        for f in fields(SamplingParams)
    }
    return RowSampling(**columns)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """u32 with the same order as the f32 ``x`` (IEEE 754 totally ordered; NaN is not expected)."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _largest_threshold(bits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Largest u32[R] ``t`` for which ``enough(bits >= t)`` holds, built from the top bit down.

    ``enough`` maps a mask bool[R, V] to bool[R] and must be monotone: more tokens, more likely.
    """

    def set_bit(i: jax.Array, t: jax.Array) -> jax.Array:
        candidate = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(bits >= candidate[:, None]), candidate, t)

    return lax.fori_loop(0, 32, set_bit, jnp.zeros_like(bits, shape=bits.shape[:1]))


def _filter(logits: jax.Array, params: RowSampling) -> jax.Array:
    """Set logits that top-k, top-p or min-p rule out to -inf, in this order."""
    bits = _ordered_bits(logits)
    best = jnp.max(bits, axis=-1)

    def by_rank(bits: jax.Array) -> jax.Array:
        def enough(kept: jax.Array) -> jax.Array:
            return jnp.sum(kept, axis=-1, dtype=jnp.int32) >= params.top_k

        return jnp.where(params.top_k > 0, _largest_threshold(bits, enough), jnp.uint32(0))

    def by_mass(bits: jax.Array, floor: jax.Array) -> jax.Array:
        kept_by_rank = bits >= floor[:, None]
        mass = jax.nn.softmax(jnp.where(kept_by_rank, logits, -jnp.inf), axis=-1)

        def enough(kept: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(kept, mass, 0.0), axis=-1) >= params.top_p

        return jnp.where(params.top_p < 1.0, _largest_threshold(bits, enough), jnp.uint32(0))

    none = jnp.zeros_like(best)
    floor = lax.cond(jnp.any(params.top_k > 0), by_rank, lambda _: none, bits)
    nucleus = lax.cond(jnp.any(params.top_p < 1.0), by_mass, lambda *_: none, bits, floor)
    # Rounding must never rule out every token: the most likely one always stays.
    floor = jnp.minimum(jnp.maximum(floor, nucleus), best)
    most_likely = jnp.max(logits, axis=-1)
    keep = (bits >= floor[:, None]) & (logits >= (most_likely + jnp.log(params.min_p))[:, None])
    return jnp.where(keep, logits, -jnp.inf)


def apply_processor(
    logits_processor: LogitsProcessor | None, logits: jax.Array, num_generated: jax.Array
) -> jax.Array:
    """Run the processor hook, if there is one.

    Args:
        logits_processor: the hook.
        logits: f32[R, V].
        num_generated: i32[R].

    Raises:
        ValueError: it returns something of another shape or dtype.
    """
    if logits_processor is None:
        return logits
    changed = logits_processor(logits, num_generated)
    found, wanted = (
        f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}" for x in (changed, logits)
    )
    if found != wanted:
        raise ValueError(f"logits_processor returned {found}, must be {wanted} as it was given")
    return changed


def _processed(
    logits: jax.Array,
    params: RowSampling,
    num_generated: jax.Array,
    counts: Counts | None,
    logits_processor: LogitsProcessor | None,
) -> jax.Array:
    """What comes before temperature: the processor hook and the penalties."""
    chosen = apply_processor(logits_processor, logits, num_generated)
    if counts is None:
        return chosen
    return lax.cond(
        any_penalty(params),
        lambda chosen: penalize(chosen, counts(), params),
        lambda chosen: chosen,
        chosen,
    )


def _perturb(chosen: jax.Array, params: RowSampling, num_generated: jax.Array) -> jax.Array:
    """Temperature, filters and Gumbel noise: the largest of f32[R, V] is the sample.

    Rows of temperature 0 come out as they are.
    """
    greedy = params.temperature == 0.0
    # Below the maximum, so that what overflows is what has no chance (and inf - inf is NaN).
    finite = jnp.minimum(chosen, _LIMITS.max)
    below = finite - jnp.maximum(jnp.max(finite, axis=-1, keepdims=True), _LIMITS.min)
    scaled = below / jnp.where(greedy, 1.0, params.temperature)[:, None]
    filtered = (params.top_k > 0) | (params.top_p < 1.0) | (params.min_p > 0.0)
    scaled = lax.cond(
        jnp.any(filtered & ~greedy), lambda x: _filter(x, params), lambda x: x, scaled
    )

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.gumbel(key, chosen.shape[1:], jnp.float32)

    gumbel = jax.vmap(noise)(params.seed, num_generated)
    return jnp.where(greedy[:, None], chosen, scaled + gumbel)


def sample(
    logits: jax.Array,
    params: RowSampling,
    num_generated: jax.Array,
    counts: Counts | None = None,
    logits_processor: LogitsProcessor | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Choose one token per row.

    The order is that of Hugging Face transformers: processor hook, penalties, temperature, top-k,
    top-p, min-p. Randomness is drawn from ``(seed, num_generated)`` alone, so
    a row's tokens do not depend on the rest of the batch.

    Args:
        logits: f32[R, V].
        params: one value per row.
        num_generated: i32[R], tokens that the row has generated so far.
        counts: gives i32[R, V], see `penalties`; called where some row has a penalty. None: none
            has.
        logits_processor: traceable hook applied first.

    Returns:
        ``(tokens i32[R], logprobs f32[R])``; a logprob is the chosen token's under the model's own
        distribution (``log_softmax`` of the unprocessed logits).
    """
    chosen = _processed(logits, params, num_generated, counts, logits_processor)

    def draw(chosen: jax.Array) -> jax.Array:
        return jnp.argmax(_perturb(chosen, params, num_generated), axis=-1)

    tokens = lax.cond(
        jnp.any(params.temperature > 0.0), draw, lambda x: jnp.argmax(x, axis=-1), chosen
    ).astype(jnp.int32)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)
    return tokens, logprobs[:, 0]


def runners_up(
    logits: jax.Array,
    params: RowSampling,
    num_generated: jax.Array,
    counts: Counts | None = None,
    logits_processor: LogitsProcessor | None = None,
    *,
    count: int,
) -> jax.Array:
    """The token that `sample` chooses and those that it would choose in its stead, in order.

    With the same noise: what a drafter guesses first, second and so on.

    Args:
        logits: as for `sample`, like what follows.
        params: same.
        num_generated: same.
        counts: same.
        logits_processor: same.
        count: how many tokens, at most V.

    Returns:
        Distinct tokens i32[R, count].
    """
    chosen = _processed(logits, params, num_generated, counts, logits_processor)
    chosen = lax.cond(
        jnp.any(params.temperature > 0.0),
        lambda x: _perturb(x, params, num_generated),
        lambda x: x,
        chosen,
    )
    return lax.top_k(chosen, count)[1]
