"""What operators ask of a server, over a blocking client: modes, removal, listing, audit, and why keys are not there.

Everything here raises TransportError when the server cannot be asked, and RequestRefused where an admin token is
needed. Long work goes in bounded steps, so that it holds nobody up and can say how far it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from mmcache.client.blocking import Client
from mmcache.client.plan import batches
from mmcache.client.protocol import put_result
from mmcache.errors import ProtocolError
from mmcache.pb import cache_pb2 as pb
from mmcache.transport.base import Op
from mmcache.why import Why

Progress = Callable[[int, int], None]
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
class Audit:
    """What an audit found: entries and bytes checked, and the keys that were dropped as bad."""

    entries: int = 0
    nbytes: int = 0
    bad: list[bytes] = field(default_factory=list)


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

    def remove(self, selection: pb.Selection, progress: Progress | None = None) -> tuple[int, int]:
        """Remove what is selected; how many entries and bytes that were."""
        entries = nbytes = start = 0
        while True:
            reply = self._client.ask(Op.REMOVE, pb.RemoveRequest(of=selection, start=start), pb.RemoveReply())
            entries, nbytes = entries + reply.entries, nbytes + reply.nbytes
            start = _following(start, reply.next, reply.rows, progress)
            if not start:
                return entries, nbytes

    def namespaces(self, selection: pb.Selection | None = None) -> Iterator[pb.NamespaceRow]:
        """The namespaces that are known, those that hold the most first. Without an admin token: the caller's own."""
        start = 0
        while True:
            reply = self._client.ask(Op.LIST, pb.ListRequest(of=selection, start=start), pb.ListReply())
            yield from reply.namespaces
            start = _following(start, reply.next, reply.next, None)
            if not start:
                return

    def entries(self, selection: pb.Selection | None = None) -> Iterator[pb.EntryRow]:
        """Every entry selected, in no order. Without an admin token: of the caller's own."""
        start = 0
        while True:
            reply = self._client.ask(Op.LIST, pb.ListRequest(of=selection, entries=True, start=start), pb.ListReply())
            yield from reply.entries
            start = _following(start, reply.next, reply.next, None)
            if not start:
                return

    def audit(self, share: float, seed: int = 0, progress: Progress | None = None) -> Audit:
        """Have the server check the stored bytes of a share (0 to 1) of its entries; what is bad it drops."""
        done, start = Audit(), 0
        while True:
            request = pb.AuditRequest(share=share, seed=seed, start=start)
            reply = self._client.ask(Op.AUDIT, request, pb.AuditReply())
            done.entries, done.nbytes = done.entries + reply.entries, done.nbytes + reply.nbytes
            done.bad += [reply.bad[at : at + 32] for at in range(0, len(reply.bad), 32)]
            start = _following(start, reply.next, reply.rows, progress)
            if not start:
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


def reason_of(why: int, ago_s: float, put_status: int = 0, children: int = 0) -> Reason:
    """A Reason from the numbers of a reply. Raises ProtocolError for one this release does not know."""
    try:
        known = Why(why)
    except ValueError:
        raise ProtocolError(f"reason {why} is unknown to this release; upgrade it") from None
    detail = put_result(put_status).reason if known is Why.REFUSED and put_status else ""
    return Reason(known, ago_s if ago_s >= 0 else None, detail, children)


def _following(start: int, following: int, rows: int, progress: Progress | None) -> int:
    """Where the next step starts; a server that does not get on is not asked for ever."""
    if following and following <= start:
        raise ProtocolError(f"the server's walk does not get on: after {start} comes {following}")
    if progress is not None:
        progress(following or rows, rows)
    return following
