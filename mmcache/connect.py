"""`connect`: from a URL to a client."""

from __future__ import annotations

from mmcache.client.blocking import Client
from mmcache.config import parse_url


def connect(
    url: str,
    *,
    verify: bool | None = None,
    deadline_s: float | None = None,
    lazy: bool = False,
    token: str | None = None,
) -> Client:
    """A client for `mmcache://HOST:PORT`, `mmcaches://HOST:PORT` (TLS), `mmcache+unix:///path` or
    `embedded://?memory=1GiB` (server in this process).

    On the same host the bytes travel through shared memory unless the URL says `transport=tcp`. `deadline_s` bounds
    every call; `verify=False` turns off checksums of reads; `token` says who asks, where the server has an access file.
    The server is asked once, and TransportError raised if it does not answer; with `lazy` it is not asked, and calls
    answer misses until it is there. Raises ConfigError.
    """
    config = parse_url(url, verify=verify, deadline_s=deadline_s, token=token)
    if config.scheme == "embedded":
        from mmcache.embedded import EmbeddedClient

        return EmbeddedClient(config)
    client = Client(config)
    if not lazy:
        try:
            client.stat()
        except BaseException:
            client.close()
            raise
    return client
