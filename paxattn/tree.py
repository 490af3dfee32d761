"""Trees of guesses: several continuations of a sequence that one ragged step can check.

A tree is static data: the parent of each node, parents before children. Node 0, the root, is the
sequence's newest token, and the others are guesses. Every node is a new token of the row, in the
order of the nodes: a token attends to what is stored and to its ancestors, and stands at the
position that its depth says (SpecInfer, Miao et al., 2023, https://arxiv.org/abs/2305.09781).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

MOST_NODES = 32  # bits of an ancestor mask


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Static: hashable, no pytree.

    Attributes:
        parents: the parent of each node, a lower number; -1 for node 0, the only root.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.parents[:1] != (-1,) or any(
            not 0 <= parent < node for node, parent in enumerate(self.parents) if node
        ):
            raise ValueError(f"{self.parents=} must be -1, then lower numbers than each node's own")

    def is_ancestor(self) -> np.ndarray:
        """bool[n, n]: whether node j is node i or one of its ancestors."""
        seen = np.eye(len(self.parents), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def depths(self) -> np.ndarray:
        """i32[n]: how many ancestors each node has."""
        return self.is_ancestor().sum(axis=1, dtype=np.int32) - 1


def tree_arrays(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """What attention wants to know of each node: ancestor mask u32[n] and depth i32[n].

    Raises:
        ValueError: there are more nodes than a mask has bits.
    """
    if len(tree.parents) > MOST_NODES:
        raise ValueError(
            f"a tree of {len(tree.parents)} nodes must have at most {MOST_NODES}: guess fewer "
            "tokens, or fewer in each place"
        )
    bits = np.uint32(1) << np.arange(len(tree.parents), dtype=np.uint32)
    masks = (tree.is_ancestor() * bits).sum(axis=1, dtype=np.uint32)
    return jnp.asarray(masks), jnp.asarray(tree.depths())


def comb(depth: int, branches: int) -> Tree:
    """So many chains from the root; node `1 + d * branches + j` is token `d` of chain `j`."""
    nodes = range(depth * branches)
    return Tree(parents=(-1, *(max(i + 1 - branches, 0) for i in nodes)))


def spine(depth: int, branches: int) -> Tree:
    """One chain that has `branches - 1` leaves beside each of its tokens, numbered as in `comb`.

    Node `1 + d * branches` continues the chain: it is the parent of all nodes with the next `d`.
    """
    nodes = range(depth * branches)
    return Tree(parents=(-1, *(max(1 + (i // branches - 1) * branches, 0) for i in nodes)))


def walk(
    tree: Tree, candidates: jax.Array, chosen: jax.Array, count: jax.Array, branches: int
) -> tuple[jax.Array, jax.Array]:
    """Follow the target's choices down the tree, in R rows at once.

    Args:
        tree: static, a `comb` or a `spine`.
        candidates: i32[R, n], the nodes' tokens.
        chosen: i32[R, n], what the target chooses after each node.
        count: i32[R], levels of the tree that were checked.
        branches: b.

    Returns:
        The nodes passed i32[R, k + 1], the last one repeated, and how many of them are guesses,
        i32[R].
    """
    parents = jnp.asarray(tree.parents, jnp.int32)
    at, kept = jnp.zeros_like(count), jnp.zeros_like(count)
    path = [at]
    for first in range(1, len(tree.parents), branches):
        nodes = jnp.arange(first, first + branches, dtype=jnp.int32)
        wanted = jnp.take_along_axis(chosen, at[:, None], axis=1)
        right = (candidates[:, first : first + branches] == wanted) & (
            parents[nodes] == at[:, None]
        )
        right &= (kept == len(path) - 1)[:, None] & (len(path) <= count)[:, None]
        found = jnp.any(right, axis=1)
        at = jnp.where(found, nodes[jnp.argmax(right, axis=1)], at)
        kept += found
        path.append(at)
    return jnp.stack(path, axis=1), kept
