"""Tokens to text as they come: incremental decoding and stop strings (host side)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNFINISHED = "\ufffd"  # what a decoder puts in place of bytes that are no character (yet)
_CONTEXT = 8  # tokens of the prompt that decide how the first new one is written (a leading space)


class TextStream:
    """Text of one growing sequence.

    New tokens are decoded together with the few before them, and what those give alone is cut off:
    how a token is written may depend on its neighbours (a leading space, bytes of one character).
    Bytes of an unfinished character are held back (and left out if the end comes first), and so is
    text that may turn out to be the beginning of a stop string, so nothing that was handed out is
    ever taken back.

    Attributes:
        stopped: whether a stop string was met; it and what follows are not part of the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """Start an empty stream.

        Args:
            tokenizer: the checkpoint's.
            stop: strings that end the text.
            prompt: the tokens before, which are not part of the text.
        """
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])
        self._context = 0  # decoding starts at this id ...
        self._done = len(self._ids)  # ... and what comes before this one was handed out
        self._held = ""

    def push(self, tokens: Sequence[int], *, final: bool) -> tuple[str, int]:
        """Add tokens.

        Args:
            tokens: the next token ids, in order.
            final: no more will follow: hand out what was held back.

        Returns:
            The text that is now certain, and how many of the tokens belong to the sequence: all,
            or those up to the one that completed a stop string.
        """
        used = 0
        for token in () if self.stopped else tokens:
            used += 1
            self._held += self._decode(token)
            found = [i for i in (self._held.find(s) for s in self._stop) if i >= 0]
            if found:
                self._held, self.stopped = self._held[: min(found)], True
                break
        keep = 0 if final or self.stopped else self._maybe_stop()
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready, used

    def _decode(self, token: int) -> str:
        """The text that a token completes."""
        self._ids.append(token)
        known = self._text(self._ids[self._context : self._done])
        text = self._text(self._ids[self._context :])
        if text == known:  # a special token: as if it had not come
            self._ids.pop()
            return ""
        if not text.startswith(known):  # the prompt ended within a character, and now it is whole
            known = known.rstrip(_UNFINISHED)
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _maybe_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0
