"""What operators ask of a server, over a blocking client: modes, removal, listing, audit, and why keys are not there.

Everything here raises TransportError when the server cannot be asked, and RequestRefused where an admin token is
needed. Long work goes in bounded steps, so that it holds nobody up and can say how far it is. Of a cluster all shards
are asked; what one that cannot be asked holds is left as it is, and the answer of the others says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar, cast

from mmcache.client.blocking import Client
from mmcache.client.cluster_answers import answered
from mmcache.client.plan import batches
from mmcache.client.protocol import put_result
from mmcache.errors import ProtocolError, RequestRefused, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op
from mmcache.why import Why

R = TypeVar("R", pb.RemoveReply, pb.AuditReply)
Progress = Callable[[int, int], None]
WALKS_AT_ONCE: Final = 32
MODES: Final = ("both", "read", "write", "off")
MODALITIES: Final = ("", "text", "image", "video", "audio")


_WORDS: Final = {
    Why.HERE: "stored",
    Why.NEVER_STORED: "never stored, or so long ago that it is forgotten",
    Why.EVICTED: "evicted to make room",
    Why.TTL_PASSED: "expired: its time to live passed",
    Why.DELETED: "deleted by a client",
    Why.REMOVED: "removed by an operator",
    Why.BAD_BYTES: "dropped: its bytes no longer matched their checksum",
    Why.REFUSED: "refused when it was to be stored",
    Why.TIMED_OUT: "timed out: its writer began and did not finish",
    Why.BEING_WRITTEN: "being written now",
    Why.READS_STOPPED: "reads are stopped by an operator (mmcache mode)",
    Why.OTHER_TENANT: "stored by another tenant, which shares nothing with this one",
}


class Reason(NamedTuple):
    """Why a key is, or is not, there. `ago_s`: since then, None where it is not known; `detail`: why it was refused."""

    why: Why
    ago_s: float | None = None
    detail: str = ""
    children: int = 0

    @property
    def text(self) -> str:
        """In words, without the time."""
        return _WORDS[self.why] + (f": {self.detail}" if self.detail else "")


@dataclass
class Removal:
    """What a removal took: entries and bytes, of each shard that had them. `silent`: shards that could not be asked, or
    not to the end, and why."""

    entries: int = 0
    nbytes: int = 0
    silent: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Audit:
    """What an audit found: entries and bytes checked, and the keys that were dropped as bad, with the shard, if it was
    one, that each was on. `silent` as of Removal."""

    entries: int = 0
    nbytes: int = 0
    bad: list[bytes] = field(default_factory=list)
    bad_on: list[str] = field(default_factory=list)
    silent: Mapping[str, str] = field(default_factory=dict)


class Operations:
    """Operators' requests to the server of one client, which stays the caller's to close."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def mode(self) -> pb.ModeReply:
        """What is stopped, for everything and for namespaces."""
        return self._client.ask(Op.MODE, pb.ModeRequest(), pb.ModeReply())

    def set_mode(self, mode: str, selection: pb.Selection | None = None) -> pb.ModeReply:
        """Allow "both", only "read" or "write", or nothing ("off"), from now on; nothing stored is lost.

        With a selection for the namespaces it selects, present and to come. A namespace gets what both allow.
        """
        request = pb.ModeRequest(set=True, mode=MODES.index(mode), of=selection)  # type: ignore[arg-type]
        return self._client.ask(Op.MODE, request, pb.ModeReply())

    def remove(self, selection: pb.Selection, progress: Progress | None = None) -> Removal:
        """Remove what is selected; how many entries and bytes that were."""
        done = Removal()

        def ask(server: Client, start: int) -> pb.RemoveReply:
            return server.ask(Op.REMOVE, pb.RemoveRequest(of=selection, start=start), pb.RemoveReply())

        def add(name: str, reply: pb.RemoveReply) -> None:
            done.entries, done.nbytes = done.entries + reply.entries, done.nbytes + reply.nbytes

        done.silent = self._walk(ask, add, progress)
        return done

    def namespaces(self, selection: pb.Selection | None = None) -> Iterator[pb.NamespaceRow]:
        """The namespaces that are known, those that hold the most first. Without an admin token: the caller's own.

        Of a cluster each one once, with what all shards hold of it, and the mode where the most is stopped.
        """
        rows: dict[tuple[bytes, str], pb.NamespaceRow] = {}
        lost = None
        try:
            for reply in self._listed(pb.ListRequest(of=selection)):
                for row in reply.namespaces:
                    named = row.namespace, row.tenant
                    rows[named] = _both(rows.get(named), row)
        except TransportError as error:
            lost = error
        yield from sorted(rows.values(), key=lambda row: row.nbytes, reverse=True)
        if lost is not None:
            raise lost

    def entries(self, selection: pb.Selection | None = None) -> Iterator[pb.EntryRow]:
        """Every entry selected, in no order. Without an admin token: of the caller's own. Of a cluster one after the
        other's, so what several hold comes several times."""
        for reply in self._listed(pb.ListRequest(of=selection, entries=True)):
            yield from reply.entries

    def audit(self, share: float, seed: int = 0, progress: Progress | None = None) -> Audit:
        """Have the server check the stored bytes of a share (0 to 1) of its entries; what is bad it drops."""
        done = Audit()

        def ask(server: Client, start: int) -> pb.AuditReply:
            return server.ask(Op.AUDIT, pb.AuditRequest(share=share, seed=seed, start=start), pb.AuditReply())

        def add(name: str, reply: pb.AuditReply) -> None:
            done.entries, done.nbytes = done.entries + reply.entries, done.nbytes + reply.nbytes
            bad = [reply.bad[at : at + 32] for at in range(0, len(reply.bad), 32)]
            done.bad += bad
            done.bad_on += [name] * len(bad)

        done.silent = self._walk(ask, add, progress)
        return done

    def explain(self, digests: Sequence[bytes]) -> list[Reason]:
        """Per key, why it is, or is not, there. That another tenant has it only an admin token is told."""
        reasons: list[Reason] = []
        for run in batches(len(digests), 1024):
            request = pb.ExplainRequest(keys=b"".join(digests[run.start : run.stop]))
            reply = self._client.ask(Op.EXPLAIN, request, pb.ExplainReply())
            if not len(reply.why) == len(reply.ago_s) == len(reply.put_status) == len(reply.children) == len(run):
                raise ProtocolError(f"the server explained {len(reply.why)} of {len(run)} keys")
            columns = zip(reply.why, reply.ago_s, reply.put_status, reply.children, strict=True)
            reasons += [reason_of(*one) for one in columns]
        return reasons

    def recent(self, limit: int = 100) -> list[pb.Miss]:
        """The last lookups that missed something, newest first. Without an admin token: the caller's own."""
        return list(self._client.ask(Op.RECENT, pb.RecentRequest(limit=limit), pb.RecentReply()).misses)

    def _walk(
        self, ask: Callable[[Client, int], R], add: Callable[[str, R], None], progress: Progress | None
    ) -> dict[str, str]:
        """Walk over every server, up to WALKS_AT_ONCE at the same time: `ask` takes the step that starts there, `add`
        its reply, one at a time. Who could not be asked, or not to the end, and why. Raises what a lone server raises;
        TransportError if that is every shard, and RequestRefused if one refused."""
        servers = self._client.servers()
        far, turn, ended = dict[str, tuple[int, int]](), threading.Lock(), threading.Event()

        def walk(name: str, server: Client) -> None:
            start = 0
            while not ended.is_set():
                reply = ask(server, start)
                start = _following(start, reply.next)
                with turn:
                    add(name, reply)
                    far[name] = start or reply.rows, reply.rows
                    if progress is not None:
                        progress(sum(done for done, _ in far.values()), sum(total for _, total in far.values()))
                if not start:
                    return

        if len(servers) == 1:
            walk(*next(iter(servers.items())))
            return {}
        with ThreadPoolExecutor(WALKS_AT_ONCE, "mmcache-walk") as pool:
            try:
                walks = {name: pool.submit(walk, name, server) for name, server in servers.items()}
                errors = {name: error for name, one in walks.items() if (error := one.exception()) is not None}
            finally:
                ended.set()  # also by Ctrl-C: steps under way end by their deadlines
        for error in errors.values():
            if not isinstance(error, TransportError) or isinstance(error, RequestRefused):
                raise error
        answered({name: errors.get(name) for name in servers})
        return {name: str(error) for name, error in errors.items()}

    def _listed(self, request: pb.ListRequest) -> Iterator[pb.ListReply]:
        """What every server lists, one after the other. Raises what a lone server raises, and TransportError after the
        last one if some could not be asked."""
        servers, silent = self._client.servers(), []
        for name, server in servers.items():
            request.start = 0
            try:
                while True:
                    reply = server.ask(Op.LIST, request, pb.ListReply())
                    yield reply
                    request.start = _following(request.start, reply.next)
                    if not request.start:
                        break
            except TransportError as error:
                if len(servers) == 1 or isinstance(error, RequestRefused):
                    raise
                silent.append(f"{name}: {error}")
        if silent or not servers:
            raise TransportError(f"{len(silent)} of {len(servers)} shards could not be asked ({'; '.join(silent)})")


def _both(first: pb.NamespaceRow | None, second: pb.NamespaceRow) -> pb.NamespaceRow:
    """One namespace as two servers know it."""
    if first is None:
        return second
    merged = pb.NamespaceRow()
    merged.CopyFrom(first if first.kind or not second.kind else second)  # who was told of it rather than who was not
    merged.entries, merged.nbytes = first.entries + second.entries, first.nbytes + second.nbytes
    merged.mode = cast("pb.Mode", first.mode | second.mode)  # a bit for each of what is stopped
    return merged


def reason_of(why: int, ago_s: float, put_status: int = 0, children: int = 0) -> Reason:
    """A Reason from the numbers of a reply. Raises ProtocolError for one this release does not know."""
    try:
        known = Why(why)
    except ValueError:
        raise ProtocolError(f"reason {why} is unknown to this release; upgrade it") from None
    detail = put_result(put_status).reason if known is Why.REFUSED and put_status else ""
    return Reason(known, ago_s if ago_s >= 0 else None, detail, children)


def _following(start: int, following: int) -> int:
    """Where the next step starts; a server that does not get on is not asked for ever."""
    if following and following <= start:
        raise ProtocolError(f"the server's walk does not get on: after {start} comes {following}")
    return following
