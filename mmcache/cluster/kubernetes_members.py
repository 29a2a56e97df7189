"""Who is in a cluster, by Kubernetes: the ready pods of a service, listed and then watched, by the official client.

In a pod the service account is used (it needs get, list and watch of endpointslices in discovery.k8s.io), else a
kubeconfig. A watch that is too old (410 Gone) is begun again with a list.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from typing import Any, Final

from mmcache.cluster.membership import Tell
from mmcache.cluster.seen import Seen
from mmcache.cluster.slices import who_is_ready
from mmcache.cluster.urls import MembersUrl
from mmcache.errors import ConfigError, MMCacheError, TransportError

try:
    import urllib3
    from kubernetes import client, config, watch
except ImportError as error:
    raise ConfigError(
        f"a cluster in Kubernetes needs the extra kubernetes ({error}); pip install 'mmcache[kubernetes]'"
    ) from None

WAIT_S: Final = 3.0  # for a connection, and for an answer
WATCH_S: Final = (
    30  # then the watch is begun again: `close`, and a connection that died in silence, are noticed by then
)
GONE: Final = 410
MAX_LIST_NBYTES: Final = 64 << 20


class KubernetesSource:
    """See Source. Raises ConfigError where neither a service account nor a kubeconfig is to be had."""

    def __init__(self, url: MembersUrl) -> None:
        self._url = url
        self._configure()

    def _configure(self) -> Any:
        """How to reach the API server. Read again for each conversation: a service account's token changes."""
        found = client.Configuration()
        options = self._url.options
        try:
            if "kubeconfig" not in options and "context" not in options and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=found)
            else:
                config.load_kube_config(options.get("kubeconfig"), options.get("context"), client_configuration=found)
        except Exception as error:  # of the library, and of YAML: whatever a kubeconfig of nonsense may bring up
            raise ConfigError(
                f"{self._url.what}: {_reason(error)}; run in a pod with a service account, or give kubeconfig=PATH"
            ) from None
        found.client_side_validation = False  # it refuses a slice without endpoints
        found.retries = urllib3.Retry(0)
        return found

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """The API's discovery group. Raises TransportError for all that goes wrong inside."""
        try:
            with client.ApiClient(self._configure()) as api:
                yield client.DiscoveryV1Api(api)
        except client.ApiException as error:
            remedy = "; allow get, list and watch of endpointslices" if error.status in (401, 403) else ""
            raise TransportError(
                f"{self._url.what}: the API server says {error.status} {error.reason}{remedy}"
            ) from error
        except MMCacheError:
            raise
        except (urllib3.exceptions.HTTPError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            # the last four: an answer that is no list of slices
            raise TransportError(f"{self._url.what}: the API server does not answer: {_reason(error)}") from error

    @property
    def _which(self) -> dict[str, Any]:
        return {"label_selector": f"kubernetes.io/service-name={self._url.service}"}

    def _list(self, api: Any) -> tuple[dict[str, dict[str, Any]], str]:
        """Slices by name, and the version of the list."""
        answer = api.list_namespaced_endpoint_slice(
            self._url.namespace, **self._which, _preload_content=False, _request_timeout=(WAIT_S, WAIT_S)
        )
        data = answer.read(MAX_LIST_NBYTES + 1)
        answer.release_conn()
        if answer.status != 200:
            raise client.ApiException(status=answer.status, reason=answer.reason)
        if len(data) > MAX_LIST_NBYTES:
            raise TransportError(f"{self._url.what}: the list is longer than {MAX_LIST_NBYTES >> 20} MiB")
        found = json.loads(data)
        slices = {one["metadata"]["name"]: one for one in found.get("items") or ()}
        return slices, found["metadata"]["resourceVersion"]

    def _seen(self, slices: dict[str, dict[str, Any]]) -> Seen:
        return who_is_ready(slices.values(), self._url.options.get("port", ""), self._url.scheme)

    def look(self) -> Seen:
        """See Source."""
        with self._open() as api:
            return self._seen(self._list(api)[0])

    def follow(self, tell: Tell, stopping: threading.Event) -> None:
        """See Source."""
        with self._open() as api:
            while not stopping.is_set():
                slices, version = self._list(api)
                tell(self._seen(slices))
                try:
                    while not stopping.is_set():
                        version = self._watch(api, slices, version, tell, stopping)
                except client.ApiException as error:
                    if error.status != GONE:
                        raise

    def _watch(
        self, api: Any, slices: dict[str, dict[str, Any]], version: str, tell: Tell, stopping: threading.Event
    ) -> str:
        """Take in changes for WATCH_S; the version up to which they are known."""
        events = watch.Watch().stream(
            api.list_namespaced_endpoint_slice,
            self._url.namespace,
            **self._which,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_S,
            _request_timeout=(WAIT_S, WATCH_S + WAIT_S),
        )
        for event in events:
            found = event["raw_object"]
            version = found["metadata"]["resourceVersion"]
            if event["type"] == "BOOKMARK":
                continue
            name = found["metadata"]["name"]
            if event["type"] == "DELETED":
                slices.pop(name, None)
            else:
                slices[name] = found
            tell(self._seen(slices))
            if stopping.is_set():
                break
        return version


def _reason(error: BaseException) -> str:
    error = getattr(error, "reason", None) or error  # of a try that urllib3 gave up, the reason is said shorter
    return " ".join(str(error).split()) or type(error).__name__
