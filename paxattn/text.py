"""Tokens to text as they come: incremental decoding and stop strings (host side)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Text of one growing sequence.

    Bytes of an unfinished character are held back (and left out if the end comes first), and so is
    text that may turn out to be the beginning of a stop string, so nothing that was handed out is
    ever taken back.

    Attributes:
        text: everything handed out so far.
        stopped: whether a stop string was met; it and what follows are not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start an empty stream.

        Args:
            tokenizer: the checkpoint's.
            stop: strings that end the text.
        """
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""

    def push(self, tokens: Sequence[int], *, final: bool) -> str:
        """Add tokens and return the text that is now certain.

        Args:
            tokens: the next token ids, in order.
            final: no more will follow: hand out what was held back.
        """
        if self.stopped:
            return ""
        for token in tokens:
            self._held += self._decoder.step(self._tokenizer, token) or ""
            found = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
            if found:
                self._held, self.stopped = self._held[: min(found)], True
                break
        keep = 0 if final or self.stopped else self._maybe_stop()
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        self.text += ready
        return ready

    def _maybe_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0
