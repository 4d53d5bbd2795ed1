"""Secrets in text: tokens and keys from the arguments and the environment, replaced before anything is shown."""

import html
import json
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
    """Values of variables that are named like secrets; a path to one is none, nor is a number as of `MAX_TOKENS`."""
    named = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    return {value for value in named if len(value) >= _SHORTEST and not value.isdigit() and not os.path.exists(value)}


def _forms(secret: str) -> set[str]:
    """A secret as it stands in plain text, in JSON and in HTML."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], html.escape(secret)}


def without_secrets(text: str) -> str:
    """The text with every known secret replaced by `***`, longer ones first in case one holds another."""
    known = {form for secret in _given | _from_environment() for form in _forms(secret)}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return text
