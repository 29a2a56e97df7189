"""mmcache: one content-addressed, verified cache for what multimodal inference computes twice.

Connect to a server, name what you computed by its content, and get it back: verified, or a miss.
"""

from mmcache._version import __version__
from mmcache.chain import PlaceholderSpan
from mmcache.client.blocking import Client
from mmcache.connect import AsyncClient, connect
from mmcache.errors import MMCacheError
from mmcache.keys import Namespace, embedding_key, item_digest, latent_key, opaque_key
from mmcache.keyset import Key, Keys, Part
from mmcache.media import media_digest, samples_digest

__all__ = [
    "AsyncClient",
    "Client",
    "Key",
    "Keys",
    "MMCacheError",
    "Namespace",
    "Part",
    "PlaceholderSpan",
    "__version__",
    "connect",
    "embedding_key",
    "item_digest",
    "latent_key",
    "media_digest",
    "opaque_key",
    "samples_digest",
]
