"""Secrets in text: tokens and keys from the arguments and the environment, replaced before anything is shown."""

import os
import re

MASK = "***"

_SHORTEST = 8
"""Shorter values are no secrets but settings such as `TOKENIZERS_PARALLELISM=false`, and would occur by chance."""

_SECRET_NAME = re.compile(r"(^|_)(TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE)_?KEY)(_|$)")

_given: set[str] = set()


def keep_secret(value: str | None) -> None:
    """From now on treat a value as a secret, because an argument for tokens holds it."""
    if value and len(value) >= _SHORTEST:
        _given.add(value)


def is_secret_name(name: str) -> bool:
    """Whether the value of an argument is a secret, as `TrainingArguments.to_dict` sees it."""
    return name.replace("-", "_").endswith("_token")


def _from_environment() -> set[str]:
    """Values of variables that are named like secrets; a path to a secret is none."""
    named = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    return {value for value in named if len(value) >= _SHORTEST and not os.path.exists(value)}


def without_secrets(text: str) -> str:
    """The text with every known secret replaced by `***`, longer ones first in case one holds another."""
    for secret in sorted(_given | _from_environment(), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text
