"""What operators' requests mean: protobuf in, steward call, protobuf out. Who may ask is the service's business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from google.protobuf.message import Message

from mmcache.pb import cache_pb2 as pb
from mmcache.server.caller import Caller
from mmcache.server.refuse import BadRequest
from mmcache.server.tenants import Tenants
from mmcache.store.answers import MAX_UNITS, UNIT_BITS, Refusal
from mmcache.store.history import Reason
from mmcache.store.namespaces import Selection, Stopped
from mmcache.store.shard import REFUSAL_CODES, Shard
from mmcache.store.steward import Steward
from mmcache.transport.base import Op
from mmcache.why import Why

MAX_LISTED: Final = 4096
NOBODY: Final = -1  # the number of a tenant that does not exist
Handler = Callable[..., Message]


class Admin:
    """Answers MODE, REMOVE, LIST, AUDIT, EXPLAIN and RECENT for one shard."""

    def __init__(self, shard: Shard, tenants: Tenants, put_status: Callable[[Refusal], int]) -> None:
        self._steward, self._shard, self._tenants, self._put_status = Steward(shard), shard, tenants, put_status
        self.handlers: dict[Op, tuple[Callable[[], Message], Handler]] = {
            Op.MODE: (pb.ModeRequest, self._mode),
            Op.REMOVE: (pb.RemoveRequest, self._remove),
            Op.LIST: (pb.ListRequest, self._list),
            Op.AUDIT: (pb.AuditRequest, self._audit),
            Op.RECENT: (pb.RecentRequest, self._recent),
        }

    def _selection(self, message: pb.Selection) -> Selection:
        if not message.older_than_s >= 0:
            raise BadRequest(f"older_than_s is {message.older_than_s}; give seconds, 0 or more")
        tenant = None
        if message.tenant:
            found = self._tenants.find(message.tenant)
            tenant = NOBODY if found is None else found
        return Selection(message.namespace, message.kind, dict(message.facts), tenant, message.older_than_s)

    def _message(self, selection: Selection) -> pb.Selection:
        tenant = selection.tenant
        return pb.Selection(
            namespace=selection.namespace,
            kind=selection.kind,
            facts=dict(selection.facts),
            tenant="" if tenant is None else self._tenants.name(tenant),
        )

    def _mode(self, caller: Caller, request: pb.ModeRequest) -> Message:
        selection = self._selection(request.of)
        if request.set:
            if selection.older_than_s:
                raise BadRequest("a mode is of namespaces, whatever their entries' age: leave out older_than_s")
            if selection.tenant == NOBODY:
                raise BadRequest(f"there is no tenant {request.of.tenant!r}; add it to the access file first")
            if not 0 <= request.mode <= Stopped.BOTH:
                raise BadRequest(f"mode {request.mode} is unknown to this release")
            if not self._steward.stop(Stopped(request.mode), selection):
                raise BadRequest("there are too many rules for namespaces; set some back to both", pb.ErrorReply.LIMIT)
        stopped, rules = self._steward.stopped()
        if not caller.admin:  # the others name tenants and models that are not the caller's business
            rules = [(of, rule) for of, rule in rules if of.tenant == caller.tenant]
        listed = [pb.ModeRule(of=self._message(of), mode=_mode(rule)) for of, rule in rules]
        return pb.ModeReply(mode=_mode(stopped), rules=listed)

    def _remove(self, caller: Caller, request: pb.RemoveRequest) -> Message:
        entries, nbytes, following, rows = self._steward.remove(self._selection(request.of), request.start)
        return pb.RemoveReply(entries=entries, nbytes=nbytes, next=following, rows=rows)

    def _list(self, caller: Caller, request: pb.ListRequest) -> Message:
        selection = self._selection(request.of)
        if not caller.admin:
            selection = replace(selection, tenant=caller.tenant)
        if not request.entries:
            found = self._steward.namespaces(selection)
            part = found[request.start : request.start + MAX_LISTED]
            following = request.start + len(part)
            rows = [
                pb.NamespaceRow(
                    namespace=use.known.namespace,
                    kind=use.known.kind,
                    facts=dict(use.known.facts),
                    tenant=self._tenants.name(use.known.tenant),
                    entries=use.entries,
                    nbytes=use.nbytes,
                    mode=_mode(use.stopped),
                )
                for use in part
            ]
            return pb.ListReply(namespaces=rows, next=following if following < len(found) else 0)
        entries, following = self._steward.entries(selection, request.start)
        now = self._shard.now()
        reply = pb.ListReply(next=following)
        for entry, namespace in entries:
            reply.entries.add(
                key=entry.key,
                namespace=namespace,
                tenant=self._tenants.name(entry.tenant),
                nbytes=entry.nbytes,
                age_s=max(0.0, now - entry.stored_at_s),
                expires_in_s=entry.expires_at - now if entry.expires_at < float("inf") else -1.0,
                children=entry.children,
                modality=entry.media >> UNIT_BITS,
                units=entry.media & MAX_UNITS,
                kind=entry.kind,
            )
        return reply

    def _audit(self, caller: Caller, request: pb.AuditRequest) -> Message:
        if not 0 < request.share <= 1:
            raise BadRequest(f"share is {request.share}; give above 0 and at most 1")
        done = self._steward.audit(request.share, request.seed, request.start)
        return pb.AuditReply(
            entries=done.entries, nbytes=done.nbytes, bad=b"".join(done.bad), next=done.following, rows=done.rows
        )

    def explain(self, caller: Caller, keys: list[bytes]) -> pb.ExplainReply:
        """Why each key is, or is not, there for the caller; an operator also hears that another tenant has it."""
        others = range(len(self._tenants)) if caller.admin else ()
        answers = self._steward.explain(caller.tenant, keys, others)
        return pb.ExplainReply(
            why=bytes(reason.why for reason, _ in answers),
            ago_s=[-1.0 if ago is None else ago for _, ago in answers],
            put_status=bytes(self._refusal(reason) for reason, _ in answers),
            children=[reason.detail if reason.why is Why.HERE else 0 for reason, _ in answers],
        )

    def _refusal(self, reason: Reason) -> int:
        return self._put_status(REFUSAL_CODES[reason.detail]) if reason.why is Why.REFUSED else 0

    def _recent(self, caller: Caller, request: pb.RecentRequest) -> Message:
        misses = self._steward.recent(None if caller.admin else caller.tenant, min(request.limit or 100, MAX_LISTED))
        reply = pb.RecentReply()
        for miss, ago_s in misses:
            since = miss.reason.since
            reply.misses.add(
                ago_s=ago_s,
                tenant=self._tenants.name(miss.tenant),
                keys=miss.asked,
                found=miss.found,
                prefix=miss.prefix,
                key=miss.key,
                why=int(miss.reason.why),
                why_ago_s=-1.0 if since is None else max(0.0, miss.at - since),
                put_status=self._refusal(miss.reason),
            )
        return reply


def _mode(stopped: Stopped) -> pb.Mode:
    return int(stopped)  # type: ignore[return-value]
