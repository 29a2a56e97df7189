"""What operators ask of a server, over a blocking client: modes, removal, listing, audit, and why keys are not there.

Everything here raises TransportError when the server cannot be asked, and RequestRefused where an admin token is
needed. Long work goes in bounded steps, so that it holds nobody up and can say how far it is. Of a cluster all shards
are asked: see `Operations.silent`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar, cast

from google.protobuf.message import Message

from mmcache.client.blocking import Client
from mmcache.client.cluster_answers import explained, mode_of, recent_of
from mmcache.client.plan import batches
from mmcache.client.protocol import put_result
from mmcache.client.servers import Errors, Progress, ask_each, following, raise_all, walk
from mmcache.errors import MMCacheError, ProtocolError, TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op
from mmcache.why import Why

M = TypeVar("M", bound=Message)
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
    """Why a key is, or is not, there. `ago_s`: since then, None where it is not known; `detail`: why it was refused, or
    what that is not known for."""

    why: Why
    ago_s: float | None = None
    detail: str = ""
    children: int = 0

    @property
    def text(self) -> str:
        """In words, without the time."""
        return _WORDS[self.why] + (f": {self.detail}" if self.detail else "")


class Removal(NamedTuple):
    """What a removal took: entries and bytes, of each shard that had them."""

    entries: int
    nbytes: int


@dataclass
class Audit:
    """What an audit found: entries and bytes checked, and the keys that were dropped as bad, each with the shard that
    it was on ("": there is one server)."""

    entries: int = 0
    nbytes: int = 0
    bad: list[bytes] = field(default_factory=list)
    bad_on: list[str] = field(default_factory=list)


class Operations:
    """Operators' requests to the servers of one client, which stays the caller's to close.

    `silent`: the shards that could not be asked, or not to a call's end, since this was made, and why last; what they
    hold is left as it was, and is not in the answer.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.silent: dict[str, str] = {}

    def mode(self) -> pb.ModeReply:
        """What is stopped, for everything and for namespaces. Of a cluster: where the most is. Raises TransportError if
        any shard could not be asked."""
        return self._mode(pb.ModeRequest())

    def set_mode(self, mode: str, selection: pb.Selection | None = None) -> pb.ModeReply:
        """Allow "both", only "read" or "write", or nothing ("off"), from now on; nothing stored is lost.

        With a selection for the namespaces it selects, present and to come. A namespace gets what both allow. Raises
        TransportError if any shard could not be asked, after all others were.
        """
        return self._mode(pb.ModeRequest(set=True, mode=MODES.index(mode), of=selection))  # type: ignore[arg-type]

    def _mode(self, request: pb.ModeRequest) -> pb.ModeReply:
        servers = self._servers()
        everybody = list(servers)
        replies = self._ask(servers, Op.MODE, request, pb.ModeReply)
        if lost := [f"{name}: {self.silent[name]}" for name in everybody if name not in servers]:
            raise TransportError(f"{len(lost)} of {len(everybody)} shards could not be asked ({'; '.join(lost)})")
        return mode_of(replies)

    def remove(self, selection: pb.Selection, progress: Progress | None = None) -> Removal:
        """Remove what is selected; how many entries and bytes that were."""
        entries = nbytes = 0

        def ask(server: Client, start: int) -> pb.RemoveReply:
            return server.ask(Op.REMOVE, pb.RemoveRequest(of=selection, start=start), pb.RemoveReply())

        def add(name: str, reply: pb.RemoveReply) -> None:
            nonlocal entries, nbytes
            entries, nbytes = entries + reply.entries, nbytes + reply.nbytes

        self._note(walk(self._servers(), ask, add, progress))
        return Removal(entries, nbytes)

    def namespaces(self, selection: pb.Selection | None = None) -> list[pb.NamespaceRow]:
        """The namespaces that are known, those that hold the most first. Without an admin token: the caller's own.

        Of a cluster each one once, with what all shards hold of it; stopped is what any shard has stopped.
        """
        rows: dict[tuple[bytes, str], pb.NamespaceRow] = {}
        for reply in self._listed(pb.ListRequest(of=selection)):
            for row in reply.namespaces:
                named = row.namespace, row.tenant
                rows[named] = _both(rows.get(named), row)
        return sorted(rows.values(), key=lambda row: row.nbytes, reverse=True)

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

        self._note(walk(self._servers(), ask, add, progress))
        return done

    def explain(self, digests: Sequence[bytes]) -> list[Reason]:
        """Per key, why it is, or is not, there: of a cluster, what the shard says that knows most. That another tenant
        has it only an admin token is told."""
        reasons: list[Reason] = []
        servers = self._servers()
        everybody = len(servers)
        for run in batches(len(digests), 1024):
            request = pb.ExplainRequest(keys=b"".join(digests[run.start : run.stop]))
            reply = explained(self._ask(servers, Op.EXPLAIN, request, pb.ExplainReply))
            if not len(reply.why) == len(reply.ago_s) == len(reply.put_status) == len(reply.children) == len(run):
                raise ProtocolError(f"the server explained {len(reply.why)} of {len(run)} keys")
            columns = zip(reply.why, reply.ago_s, reply.put_status, reply.children, strict=True)
            reasons += [_as_known(reason_of(*one), everybody - len(servers), everybody) for one in columns]
        return reasons

    def recent(self, limit: int = 100) -> list[pb.Miss]:
        """The last lookups that missed something, newest first. Without an admin token: the caller's own."""
        request = pb.RecentRequest(limit=limit)
        return recent_of(self._ask(self._servers(), Op.RECENT, request, pb.RecentReply), limit)

    def _servers(self) -> dict[str, Client | MMCacheError]:
        return dict(self._client.servers())

    def _note(self, errors: Errors) -> None:
        self.silent |= {name: str(error) for name, error in sorted(errors.items())}

    def _ask(self, servers: dict[str, Client | MMCacheError], op: Op, request: Message, reply: type[M]) -> list[M]:
        """What each replies to one request; who does not is noted, and is in `servers` no more. Raises what stands for
        all if nobody does."""
        replies, errors = ask_each(servers, lambda _, server: server.ask(op, request, reply()))
        if not replies:
            raise_all(errors)
        self._note(errors)
        for name in errors:
            del servers[name]
        return list(replies.values())

    def _listed(self, request: pb.ListRequest) -> Iterator[pb.ListReply]:
        """What every server lists, one after the other. Raises, after the last, what stands for all if none listed."""
        servers, errors, listed = self._servers(), Errors(), False
        for name, server in servers.items():
            request.start = 0
            try:
                if isinstance(server, MMCacheError):
                    raise server
                while True:
                    reply = server.ask(Op.LIST, request, pb.ListReply())
                    listed = True
                    yield reply
                    request.start = following(request.start, reply.next)
                    if not request.start:
                        break
            except (MMCacheError, OSError) as error:
                if len(servers) == 1:
                    raise
                errors[name] = error
        self._note(errors)
        if not listed:
            raise_all(errors)


def reason_of(why: int, ago_s: float, put_status: int = 0, children: int = 0) -> Reason:
    """A Reason from the numbers of a reply. Raises ProtocolError for one this release does not know."""
    try:
        known = Why(why)
    except ValueError:
        raise ProtocolError(f"reason {why} is unknown to this release; upgrade it") from None
    detail = put_result(put_status).reason if known is Why.REFUSED and put_status else ""
    return Reason(known, ago_s if ago_s >= 0 else None, detail, children)


def _as_known(reason: Reason, silent: int, everybody: int) -> Reason:
    """A shard that says nothing may have what the others never had."""
    if reason.why is not Why.NEVER_STORED or not silent:
        return reason
    return reason._replace(detail=f"as far as is known, for {silent} of {everybody} shards could not be asked")


def _both(first: pb.NamespaceRow | None, second: pb.NamespaceRow) -> pb.NamespaceRow:
    """One namespace as two servers know it."""
    if first is None:
        return second
    merged = pb.NamespaceRow()
    merged.CopyFrom(first if first.kind or not second.kind else second)  # who was told of it rather than who was not
    merged.entries, merged.nbytes = first.entries + second.entries, first.nbytes + second.nbytes
    merged.mode = cast("pb.Mode", first.mode | second.mode)  # a bit for each of what is stopped
    return merged
