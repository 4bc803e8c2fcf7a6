"""A run's options without the secrets in them, for what it writes down or prints."""

import json
import re
from typing import Any
from urllib.parse import parse_qsl

HIDDEN = "<hidden>"
# Words of a name: `hub_token`, `HF_TOKEN`, `x-api-key`, `apiKey`.
_SECRETS = {"secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase", "credential", "credentials"}
_SECRETS |= {"auth", "authorization", "authentication", "cookie", "cookies", "apikey", "apikeys"}
# Under these only text is secret: numbers are ids and counts, as in `eos_token_id`.
_SECRET_TEXTS = {"token", "key", "keys"}
_VOCABULARY = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|stop|special)_token")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_URL = re.compile(r"""(?P<scheme>\b[\w+.-]+://)(?P<user>[^\s/?#@'"]+@)?(?P<place>[^\s?'"]*)(?P<query>\?[^\s'"]*)?""")


def redacted(value: Any, name: str = "") -> Any:
    """
    `value` with the secrets in it replaced by `HIDDEN`: what stands under a name with a word such as token, key,
    secret, password or auth, in dicts and lists at any depth and in JSON written as text; and users, passwords and such
    arguments in URLs. All else stays as it is, as do None and booleans (`token=True`), which hold no secret.

    Args:
        value: an option's value, or a dict of options.
        name: the option's name; "" for a dict of options.
    """
    if value is None or isinstance(value, bool):
        return value
    words = {word.lower() for word in _WORDS.findall(name)}
    if words & _SECRETS:
        return HIDDEN
    if isinstance(value, dict):
        return {key: redacted(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, name) for inner in value]
    if isinstance(value, str | bytes) and words & _SECRET_TEXTS and not _VOCABULARY.search(name):
        return HIDDEN
    return _redacted_text(value) if isinstance(value, str) else value


def _redacted_text(text: str) -> str:
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except ValueError:  # a template, for one
            content = {}
        if redacted(content) != content:
            return json.dumps(redacted(content))
    return _URL.sub(_redacted_url, text)


def _redacted_url(url: re.Match[str]) -> str:
    user, query = url["user"] and f"{HIDDEN}@", url["query"]
    if query and redacted(arguments := dict(parse_qsl(query[1:]))) != arguments:
        query = f"?{HIDDEN}"
    return f"{url['scheme']}{user or ''}{url['place']}{query or ''}"
