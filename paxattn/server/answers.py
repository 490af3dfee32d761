"""What a client is answered, as the OpenAI API has it, whole or in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from paxattn.results import Delta
from paxattn.server.errors import ApiError, as_api_error, to_json
from paxattn.server.protocol import Asked
from paxattn.serving import Deltas


class Answer:
    """The answer to one request, put together from the engine's news.

    Completions and chats differ only in the names of things.
    """

    def __init__(self, asked: Asked, deltas: Deltas, name: str, tokenizer: Tokenizer) -> None:
        """Begin.

        Args:
            asked: what for.
            deltas: the engine's news of it.
            name: the model's.
            tokenizer: to show tokens.
        """
        self._asked, self._deltas, self._tokenizer = asked, deltas, tokenizer
        self._samples = asked.options["num_samples"]
        self._count = len(asked.prompts) * self._samples
        self._new_tokens, self._cached_tokens = 0, [0] * len(asked.prompts)
        self._offsets = [0] * self._count
        kind, letters = (
            ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        )
        self._head = {
            "id": f"{letters}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        found: list[list[Delta]] = [[] for _ in range(self._count)]
        async for delta in self._news():
            found[delta.index].append(delta)
        choices = []
        for index, deltas in enumerate(found):
            text = self._echo(index) + "".join(delta.text for delta in deltas)
            choice: dict[str, Any] = {"index": index}
            if self._asked.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choice["logprobs"] = self._logprobs(index, deltas)
            choice["finish_reason"] = _reason(deltas[-1])
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """As server-sent events; an error after the first of them is one too."""
        try:
            async for piece in self._pieces():
                yield b"data: " + to_json(piece) + b"\n\n"
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield b"data: " + to_json(as_api_error(error).body) + b"\n\n"
            if as_api_error(error).status == 500:
                raise

    async def _pieces(self) -> AsyncIterator[dict[str, Any]]:
        head: dict[str, Any] = self._head
        if self._asked.chat:
            head = {**head, "object": "chat.completion.chunk"}
        if self._asked.usage:
            head = {**head, "usage": None}
        for index in range(self._count):
            opening: dict[str, Any]
            if self._asked.chat:
                opening = {"delta": {"role": "assistant", "content": ""}}
            elif self._echo(index):
                opening = {"text": self._echo(index)}
            else:
                continue
            choice = {"index": index, **opening, "logprobs": None, "finish_reason": None}
            yield {**head, "choices": [choice]}
        async for delta in self._news():
            text: dict[str, Any] = {"text": delta.text}
            if self._asked.chat:
                text = {"delta": {"content": delta.text} if delta.text else {}}
            news: dict[str, Any] = {
                "index": delta.index,
                **text,
                "logprobs": self._logprobs(delta.index, [delta]),
                "finish_reason": _reason(delta),
            }
            yield {**head, "choices": [news]}
        if self._asked.usage:
            yield {**head, "choices": [], "usage": self._usage()}

    async def _news(self) -> AsyncIterator[Delta]:
        async for delta in self._deltas:
            self._new_tokens += len(delta.tokens)
            if delta.index % self._samples == 0:  # the others share what it has stored
                self._cached_tokens[delta.index // self._samples] = delta.cached_tokens or 0
            yield delta

    def _echo(self, index: int) -> str:
        return self._asked.echoes[index // self._samples]

    def _usage(self) -> dict[str, Any]:
        prompts = sum(map(len, self._asked.prompts))
        return {
            "prompt_tokens": prompts,
            "completion_tokens": self._new_tokens,
            "total_tokens": prompts + self._new_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    def _logprobs(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """Of all the tokens, those that end a text too; in the order in which they came."""
        if not self._asked.logprobs:
            return None
        tokens = [self._shown(token) for delta in deltas for token in delta.tokens]
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        tops = [
            [(self._shown(token), logprob) for token, logprob in top]
            for delta in deltas
            for top in delta.top_logprobs
        ]
        if self._asked.chat:
            content = [
                {**_entry(*one), "top_logprobs": [_entry(*other) for other in top]}
                for one, top in zip(
                    zip(tokens, logprobs, strict=True), tops or [[]] * len(tokens), strict=True
                )
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": [
                dict(top) | {token: logprob}
                for top, token, logprob in zip(tops, tokens, logprobs, strict=True)
            ]
            if tops
            else None,
            "text_offset": offsets,
        }

    def _shown(self, token: int) -> str:
        """A token by itself; with its space, which some decoders take from what comes first."""
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        word = self._tokenizer.id_to_token(token) or ""
        return f" {text}" if word.startswith("▁") and not text.startswith(" ") else text


def _entry(token: str, logprob: float) -> dict[str, Any]:
    """Of a chat's log-probabilities, with the token's UTF-8 unless it is a part of a character."""
    utf8 = None if "\ufffd" in token else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": utf8}


def _reason(delta: Delta) -> str | None:
    """The API's word for it."""
    if delta.finish_reason == "abort":
        raise ApiError("the server is shutting down", status=503)
    return "length" if delta.finish_reason == "out_of_pages" else delta.finish_reason
