"""A record that is a conversation: checked, and as plain messages."""

from collections.abc import Sequence
from typing import Any

from tlite_jax.config import ChatConfig

Message = dict[str, Any]  # role, content, and whatever else a template reads
ANSWERS = "assistant"


def fields_of(config: ChatConfig) -> list[str]:
    """The fields of a record that are read."""
    names = (config.messages_field, config.prompt_field, config.response_field)
    return [name for name in names if name is not None]


def read_messages(config: ChatConfig, values: dict[str, Any]) -> list[Message] | str:
    """Returns a record's messages, or what is wrong with it."""
    for name in fields_of(config):
        if values.get(name) is None:
            return f"no field {name!r}"
    if config.messages_field is None:
        pair = [values[name] for name in fields_of(config)]
        messages = [{"role": role, "content": content} for role, content in zip(("user", ANSWERS), pair, strict=True)]
    else:
        messages = values[config.messages_field]
    if not isinstance(messages, list) or not messages:
        return "messages are not a list of some"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "a message without a role"
        if not isinstance(message.get("content"), str):
            return "a message's content is not a string"
    if messages[0]["role"] == ANSWERS:
        return "begins with an answer"
    if not any(message["content"].strip() for message in messages if message["role"] == ANSWERS):
        return "no answer to learn from"
    return messages


def plain_text(messages: Sequence[Message]) -> str:
    """What duplicates and labels are found by: the messages' contents."""
    return "\n\n".join(message["content"] for message in messages)


def scored_bytes(messages: Sequence[Message]) -> int:
    """UTF-8 bytes of the answers."""
    return sum(len(message["content"].encode()) for message in messages if message["role"] == ANSWERS)
