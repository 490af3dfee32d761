"""Prompts on the host, made ready for the device: padded to buckets, alike beginnings found."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from paxattn.step import PackedPrompts


def bucket(n: int, smallest: int = 1) -> int:
    """Smallest 2**k or 3 * 2**k that is at least ``n`` and ``smallest``."""
    n = max(n, smallest)
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= n else power


def pack_prompts(
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int | None],
    *,
    page_size: int,
    group: int,
    num_rows: int,
    total: int,
) -> PackedPrompts:
    """Lay prompts one after the other, ``group`` rows for each.

    Args:
        prompts: token ids.
        owners: prompts share pages with those of the same owner; None: with none.
        page_size: tokens per page.
        group: rows per prompt; only the first of them has a source.
        num_rows: rows in all; those beyond the prompts' are padding.
        total: room for tokens.
    """
    lens = np.array([len(prompt) for prompt in prompts], np.int64)
    tokens = np.zeros(total, np.int32)
    tokens[: lens.sum()] = [token for prompt in prompts for token in prompt]
    starts, sources, common = (np.zeros(num_rows, np.int32) for _ in range(3))
    starts[: len(prompts) * group] = np.repeat(np.cumsum(lens) - lens, group)
    first = slice(0, len(prompts) * group, group)
    found = shared_beginnings(prompts, owners, page_size)
    sources[first] = [source * group for source, _ in found]
    common[first] = [count for _, count in found]
    arrays = {"tokens": tokens, "starts": starts, "sources": sources, "common": common}
    return PackedPrompts(**{name: jnp.asarray(array) for name, array in arrays.items()})


def shared_beginnings(
    prompts: Sequence[Sequence[int]], owners: Sequence[int | None], page_size: int
) -> list[tuple[int, int]]:
    """For each prompt: the first earlier one that begins most alike, and how many tokens.

    Whole pages count, and never the last token, whose logits somebody wants. The pages of all
    prompts form a tree per owner; every node knows which prompt came by it first.
    """
    nodes: dict[tuple[int, int, tuple[int, ...]], tuple[int, int]] = {}
    found = []
    for i, (prompt, owner) in enumerate(zip(prompts, owners, strict=True)):
        node, source, common = -1, 0, 0
        for start in range(0, (len(prompt) - 1) // page_size * page_size, page_size):
            if owner is None:
                break
            end = start + page_size
            key = (owner, node, tuple(prompt[start:end]))
            node, first = nodes.setdefault(key, (len(nodes), i))
            if first < i:
                source, common = first, end
        found.append((source, common))
    return found
