"""Reading the messages of a conversation."""

from __future__ import annotations

from typing import Any

from paxattn.server.errors import ApiError
from paxattn.server.fields import Fields

NO_TOOLS = "this server calls no tools"


def read_message(index: int, message: Any) -> dict[str, Any]:
    """``{"role", "content"}``, checked, with its content as one text."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ApiError(f"{where} must be an object with a role and a content", param=where)
    known = {"role", "content", "name", "refusal", "tool_calls", "function_call"}
    fields = Fields(message, known, f"{where}.")
    for name in ("tool_calls", "function_call"):
        fields.only(name, ([],), NO_TOOLS)
    role, content = fields.get("role"), fields.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise ApiError(
            f"{where}.role is {str(role)[:80]!r}: must be system, developer, user or assistant",
            param=f"{where}.role",
        )
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(one.get("type") == "text" and isinstance(one.get("text"), str) for one in parts):
            raise ApiError(f"{where}.content: parts of type text only", param=f"{where}.content")
        content = "\n".join(part["text"] for part in parts)
    elif not isinstance(content, str):
        raise fields.refuse("content", "a string, or a list of parts of type text")
    role = "system" if role == "developer" else role  # the same by its older name
    read = {"role": role, "content": content}
    return read if fields.get("name") is None else {**read, "name": fields.text("name")}
