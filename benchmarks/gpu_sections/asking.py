"""A decoder that attends as it is told: by a kernel asked for by name, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

from gpu_sections.context import Context
from paxattn.nn import attend


class Asking(nnx.Module):
    """A `LanguageModel` around a decoder, with another function in place of `nn.attend`."""

    def __init__(self, decoder: Any, how: Callable[..., Any]) -> None:
        self.decoder, self.how = decoder, how

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self.decoder.config

    def init_cache(self, **sizes: Any) -> Any:
        """The decoder's."""
        return self.decoder.init_cache(**sizes)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The decoder's."""
        return self.decoder.logits(hidden)

    def __call__(self, tokens: jax.Array, batch: Any, cache: Any) -> Any:
        """The decoder's, attending as told."""
        return self.decoder(tokens, batch, cache, attend=self.how)


def by_kernel(context: Context) -> Callable[..., Any]:
    """Attention by the implementation that is measured; the reference where it declines."""
    return partial(attend, implementation=(context.implementation, "reference"))
