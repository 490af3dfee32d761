"""An HTTP server in front of an `Engine`, of the OpenAI API; needs ``paxattn[serve]``."""

from paxattn.server.app import create_app
from paxattn.server.chat import ChatTemplate, read_chat_template
from paxattn.server.run import Server

__all__ = ["ChatTemplate", "Server", "create_app", "read_chat_template"]
