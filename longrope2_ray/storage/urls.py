"""URLs that may be written down: none that carries a secret."""

import re
from urllib.parse import unquote_plus

AZURE = ("abfs", "abfss", "wasb", "wasbs")  # their URLs are container@account


SECRET_KEYS = {
    "sig", "signature", "x-amz-signature", "x-amz-credential", "x-amz-security-token", "x-goog-signature", "token",
    "access_token", "key", "secret", "password", "awsaccesskeyid",
}  # fmt: skip


USER_INFO = re.compile(
    r"(?s)[^/?#:\[]+:(?!\d*(?:[/?#]|$)).*@|[^/?#]*@"
)  # a key may hold a slash, a port not


def refuse_credentials(url: str) -> str:
    """The URL itself, unless it carries a secret: it would end up in logs, reports and run directories.

    Raises:
        ValueError: if so.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    secret = any(
        unquote_plus(key).lower() in SECRET_KEYS for key in re.findall(r"[?&;#]([^=?&;#]+)=", rest)
    )
    user = USER_INFO.match(rest)
    if user and ":" not in user[0] and scheme.rsplit("::", 1)[-1].lower() in AZURE:
        user = None  # the container
    if user or secret:
        place = re.sub(r"(?s)[?&;#].*", "?***", rest[user.end() :] if user else rest)
        raise ValueError(
            f"expected a URL without credentials, got {scheme}://{'***@' if user else ''}{place}; give them by the "
            f"environment or the configuration of the storage's client"
        )
    return url
