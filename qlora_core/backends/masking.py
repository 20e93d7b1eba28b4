"""Leave out what opens doors of all that is told or kept where others read: logs, errors, tags.

Prefect and MLflow keep texts in clear, and what workers print is not ours: a traceback may hold an
address with its password, or a header with its token.
"""

import os
import re

MASK = "***"
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+(?=@)")
_SECRET_NAMES = re.compile(r".*(TOKEN|PASSWORD|SECRET|KEY|AUTH_STRING)", re.IGNORECASE)
_SECRETS = re.compile(r"(?<=Bearer )[\w.~+/=-]+|\bhf_\w{16,}")
_SHORTEST_SECRET = 8  # variables of such names also hold `1` and `none`


def mask_credentials(text: str) -> str:
    """Return ``text`` with the user and password of every URI in it masked.

    >>> mask_credentials("https://me:secret@mlflow.example/api")
    'https://***@mlflow.example/api'
    """
    return _CREDENTIALS.sub(MASK, text)


def mask_secrets(text: str) -> str:
    """Return ``text`` without what opens doors: credentials, tokens, this process's own secrets.

    >>> mask_secrets("Authorization: Bearer c4nary")
    'Authorization: Bearer ***'
    """
    for name, value in os.environ.items():
        if _SECRET_NAMES.fullmatch(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, MASK)
    return _SECRETS.sub(MASK, mask_credentials(text))
