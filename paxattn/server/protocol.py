"""What a client asks of the OpenAI API, checked: completions and chat completions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paxattn.requests import prompt_ids, stop_strings, stop_tokens
from paxattn.sampling import SamplingParams
from paxattn.server.chat import ChatTemplate
from paxattn.server.errors import ApiError
from paxattn.server.fields import Fields, is_tokens, naming
from paxattn.server.messages import NO_TOOLS, read_message
from paxattn.serving import Engine, RequestOptions
from paxattn.serving.top_logprobs import MOST

_MOST_STOPS = 16
_MOST_SAMPLES = 128

# Beyond OpenAI's own: what other servers of this API call the same.
_EXTENSIONS = {
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "priority",
}
# They say nothing about the text.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
_COMMON = {
    *_EXTENSIONS,
    *_IGNORED,
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
}
# What is not there, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": (({},), "this server biases no logits"),
}
_UNSUPPORTED_IN_COMPLETIONS = _UNSUPPORTED | {
    "suffix": (("",), "this server does not fill in the middle"),
}
_UNSUPPORTED_IN_CHAT = _UNSUPPORTED | {
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "response_format": (({"type": "text"},), "this server does not constrain the format"),
    "modalities": ((["text"],), "this server writes text"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, checked.

    Attributes:
        chat: chat completions rather than completions.
        prompts: token ids of each.
        echoes: what the text of each prompt's completions begins with.
        options: for the engine; ``num_samples`` of each prompt.
        stream: as server-sent events.
        usage: whether their last one is the usage.
        logprobs: whether those of the tokens are wanted.
    """

    chat: bool
    prompts: list[list[int]]
    echoes: list[str]
    options: RequestOptions
    stream: bool
    usage: bool
    logprobs: bool


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Checks bodies for one model.

    Attributes:
        engine: it has a tokenizer; for its sizes.
        name: the model's, as clients call it.
        stop_token_ids: tokens that end a text.
        template: for chats; None: the model has none.
        priorities: whether clients may set theirs.
    """

    engine: Engine
    name: str
    stop_token_ids: tuple[int, ...]
    template: ChatTemplate | None
    priorities: bool

    def completion(self, body: Any) -> Asked:
        """Read a body of ``/v1/completions``.

        Raises:
            ApiError: it asks for what there is not.
        """
        own = {"prompt", "echo", "best_of", *_UNSUPPORTED_IN_COMPLETIONS}
        fields = self._fields(body, own, _UNSUPPORTED_IN_COMPLETIONS)
        fields.only("best_of", (fields.get("n") or 1,), "this server returns all of n samples")
        given = self._prompts(fields)
        name = "the prompt" if len(given) == 1 else "prompt {}"
        prompts = [self._ids(name.format(i), prompt) for i, prompt in enumerate(given)]
        logprobs, echo = fields.get("logprobs") is not None, fields.flag("echo")
        # The likeliest so many, and the chosen one besides.
        top = fields.integer("logprobs", 0, 0, MOST)
        if logprobs and echo:
            raise ApiError("echo and logprobs do not go together here", param="echo")
        new = fields.integer("max_tokens", min(16, self.engine.longest - 1), 0, 2**31 - 1)
        return Asked(
            chat=False,
            prompts=prompts,
            echoes=[self._echo(prompt) if echo else "" for prompt in given],
            options=self._options(fields, prompts, new, top),
            logprobs=logprobs,
            **self._streaming(fields),
        )

    def chat(self, body: Any) -> Asked:
        """Read a body of ``/v1/chat/completions``.

        Raises:
            ApiError: it asks for what there is not.
        """
        own = {"messages", "max_completion_tokens", "chat_template_kwargs", "top_logprobs"}
        fields = self._fields(body, own | set(_UNSUPPORTED_IN_CHAT), _UNSUPPORTED_IN_CHAT)
        logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, 0, MOST)
        if top and not logprobs:
            raise ApiError("top_logprobs goes with logprobs only", param="top_logprobs")
        prompt = self._conversation(fields)
        left = max(1, self.engine.longest - len(prompt))
        new = fields.integer("max_tokens", left, 1, 2**31 - 1)
        new = fields.integer("max_completion_tokens", new, 1, 2**31 - 1)
        return Asked(
            chat=True,
            prompts=[prompt],
            echoes=[""],
            options=self._options(fields, [prompt], new, top),
            logprobs=logprobs,
            **self._streaming(fields),
        )

    def check_model(self, name: str) -> None:
        """Refuse a model of another name."""
        if name != self.name:
            raise ApiError(
                f"there is no model {name[:200]!r} here, only {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _fields(
        self, body: Any, own: set[str], unsupported: Mapping[str, tuple[tuple[Any, ...], str]]
    ) -> Fields:
        fields = Fields(body, _COMMON | own)
        self.check_model(fields.text("model"))
        for name, (values, why) in unsupported.items():
            fields.only(name, values, why)
        return fields

    def _options(
        self, fields: Fields, prompts: list[list[int]], new: int, top: int
    ) -> RequestOptions:
        """What goes to the engine, with ``new`` tokens for each completion."""
        longest, limit = max(map(len, prompts)), self.engine.longest
        if longest + new > limit:
            raise ApiError(
                f"this server takes at most {limit} tokens: {longest} of the prompt and {new} to "
                f"be generated are {longest + new}; shorten the prompt, or max_tokens",
                param="max_tokens" if longest < limit else "prompt",
                code="context_length_exceeded",
            )
        samples = fields.integer("n", 1, 1, _MOST_SAMPLES)
        places = self.engine.max_requests
        if len(prompts) * samples > places:
            raise ApiError(
                f"{len(prompts)} prompts with n={samples} are {len(prompts) * samples} completions:"
                f" this server has places for {places}; lower n, or ask for fewer prompts at once",
                param="n",
            )
        # Randomness that nobody asked to repeat.
        seed = fields.integer("seed", secrets.randbits(32), -(2**63), 2**63 - 1) % 2**32
        temperature = fields.number("temperature", 1.0, 0.0, 2.0)
        sampling = SamplingParams(
            temperature=temperature if temperature > 1e-6 else 0.0,
            top_p=max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-9),  # 0: the likeliest token only
            top_k=max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),  # elsewhere -1 is all of them
            min_p=fields.number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
            seed=seed,
        )
        # The lowest go first, as with other servers of this API.
        priority = -fields.integer("priority", 0, 1 - 2**31, 2**31 - 1)
        if priority and not self.priorities:
            raise ApiError(
                "priority: who comes first goes first here: leave it out, or start the server with "
                "--scheduling-policy priority",
                param="priority",
                code="unsupported",
            )
        ends = fields.tokens("stop_token_ids")
        if not fields.flag("ignore_eos"):
            ends = [*self.stop_token_ids, *ends]
        stop = fields.texts("stop", _MOST_STOPS)
        most = self.engine.max_stop_ids
        if len(ends) > most:
            raise ApiError(
                f"stop_token_ids: {len(ends)} tokens would end a text, with the model's own: this "
                f"server takes at most {most}",
                param="stop_token_ids",
            )
        with naming("stop_token_ids"):
            stop_tokens(ends, self.engine.model.config.vocab_size)
        with naming("stop"):
            stop_strings(stop, self.engine.tokenizer)
        return {
            "max_new_tokens": new,
            "sampling": sampling,
            "num_samples": samples,
            "stop_token_ids": ends,
            "stop": stop,
            "priority": priority,
            "top_logprobs": min(top, self.engine.model.config.vocab_size),
        }

    def _streaming(self, fields: Fields) -> dict[str, bool]:
        stream = fields.flag("stream")
        known = {"include_usage", "include_obfuscation"}
        options = Fields(fields.mapping("stream_options"), known, "stream_options.")
        if fields.get("stream_options") is not None and not stream:
            raise ApiError("stream_options goes with stream only", param="stream_options")
        return {"stream": stream, "usage": options.flag("include_usage")}

    def _prompts(self, fields: Fields) -> list[str | list[int]]:
        """A text, token ids, or a list of either."""
        value = fields.get("prompt")
        if isinstance(value, str) or (value and is_tokens(value)):
            value = [value]
        if not isinstance(value, list) or not value:
            raise fields.refuse("prompt", "a string, a list of token ids, or a list of these")
        return value

    def _ids(self, name: str, prompt: Any) -> list[int]:
        with naming("prompt"):
            return prompt_ids(
                name, prompt, self.engine.tokenizer, self.engine.model.config.vocab_size
            )

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):  # decoded, it may lack special tokens, spaces and the like
            return prompt
        return self.engine.tokenizer.decode(prompt)  # type: ignore[union-attr]

    def _conversation(self, fields: Fields) -> list[int]:
        """The prompt that the messages make."""
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            raise fields.refuse("messages", "a list of messages")
        read = [read_message(i, one) for i, one in enumerate(messages)]
        if self.template is None:
            raise ApiError(
                f"the model {self.name!r} has no chat template, so it takes no messages: use "
                "/v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        with naming("messages"):
            text = self.template.render(read, fields.mapping("chat_template_kwargs"))
            text.encode()  # half a character is none
            # The template writes the special tokens itself.
            ids = self.engine.tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[union-attr]
            return prompt_ids("the conversation", ids, None, self.engine.model.config.vocab_size)
