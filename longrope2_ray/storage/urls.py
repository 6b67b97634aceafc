"""URLs without secrets: a URL ends up in logs, reports and run directories."""

import re
from urllib.parse import unquote_plus

AZURE = ("abfs", "abfss", "wasb", "wasbs")  # their URLs are container@account
SECRET_KEYS = {
    "sig",
    "signature",
    "x-amz-signature",
    "x-amz-credential",
    "x-amz-security-token",
    "x-goog-signature",
    "token",
    "access_token",
    "key",
    "secret",
    "password",
    "awsaccesskeyid",
}
# User and password before the host; a key may hold a slash, a port may not.
USER_INFO = re.compile(r"(?s)[^/?#:\[]+:(?!\d*(?:[/?#]|$)).*@|[^/?#]*@")


def refuse_credentials(url: str) -> str:
    """Return the URL itself, unless it carries a secret.

    Raises:
        ValueError: if it carries a secret; the message does not repeat the secret.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    keys = re.findall(r"[?&;#]([^=?&;#]+)=", rest)
    secret = any(unquote_plus(key).lower() in SECRET_KEYS for key in keys)
    user = USER_INFO.match(rest)
    if user and ":" not in user[0] and scheme.rsplit("::", 1)[-1].lower() in AZURE:
        user = None  # the container
    if user or secret:
        place = re.sub(r"(?s)[?&;#].*", "?***", rest[user.end() :] if user else rest)
        raise ValueError(
            f"expected a URL without credentials, got {scheme}://{'***@' if user else ''}{place}; "
            f"give them by the environment or the configuration of the storage's client"
        )
    return url
