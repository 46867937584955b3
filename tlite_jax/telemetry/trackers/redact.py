"""What an error says, without keys and passwords, in a line."""

import os
import re

_VARIABLES = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "DATABRICKS_TOKEN")
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_LONGEST = 300


def one_line(text: str) -> str:
    """The first line that says something, cut, with `***` for the secrets of the environment and of addresses."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    for secret in filter(None, map(os.environ.get, _VARIABLES)):
        line = line.replace(secret, "***")
    return without_user(line)[:_LONGEST]


def without_user(address: str) -> str:
    """An address without the user and the password in it."""
    return _USER.sub("***@", address)
