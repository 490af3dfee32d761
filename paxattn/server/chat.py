"""A checkpoint's chat template: messages to the text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paxattn.models import CheckpointError
from paxattn.models.config import read_json


class ChatTemplate:
    """A template in the form that Hugging Face checkpoints have it.

    It runs in jinja2's sandbox, with what transformers gives it: ``raise_exception``,
    ``strftime_now``, ``tojson``, loop controls, and the names of the special tokens.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """Compile it.

        Args:
            source: the template.
            tokens: special tokens by name, such as ``bos_token``.

        Raises:
            ValueError: it is not a template.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"not a chat template: {error}") from None
        self._tokens = dict(tokens or {})

    def render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        Args:
            messages: ``{"role", "content"}`` each.
            variables: further ones that the template knows.

        Raises:
            ValueError: the template does not take these messages.
        """
        known = {
            **self._tokens,
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": True,
        }
        try:
            return self._template.render(known)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None


def read_chat_template(directory: Path, own: Path | None = None) -> ChatTemplate | None:
    """A checkpoint's template: of chat_template.jinja, or of tokenizer_config.json.

    Args:
        directory: the checkpoint's; special tokens are of its tokenizer_config.json in any case.
        own: a file to read instead.

    Raises:
        CheckpointError: a file is damaged.
    """
    path, file = directory / "tokenizer_config.json", own or directory / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
    source = config.get("chat_template")
    if own is not None or file.is_file():
        path, source = file, file.read_text(encoding="utf-8")
    tokens = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    try:
        if isinstance(source, list):  # several, by name
            source = {one["name"]: one["template"] for one in source}.get("default")
        return None if source is None else ChatTemplate(source, tokens)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: chat_template: {error}") from None


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
