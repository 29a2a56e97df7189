"""Claims on memory that end by themselves: read leases and write reservations, oldest first.

Both kinds last the same `lease_s`, so insertion order is expiry order and finding what has expired costs nothing
when nothing has. Leases are tuples of numbers and bytes, which the garbage collector stops tracking. Nothing here
touches rows or extents; the index does, with what these tables return. PURE: `now` is an argument.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import NamedTuple


class Lease(NamedTuple):
    """A reader's claim: `pins` holds pairs of 32-bit numbers, a row and the extent node it had when pinned."""

    tenant: int
    expires_at: float
    pins: bytes

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(row, node), in the order of the keys of the call."""
        numbers = iter(memoryview(self.pins).cast("I"))
        return zip(numbers, numbers, strict=True)


class Leases:
    """Open leases by id: those that expire, and lasting ones, whose holder is sure to end them."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, Lease] = OrderedDict()  # a dict would walk its graves to find the oldest
        self._lasting: dict[int, Lease] = {}
        self._counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._open) + len(self._lasting)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._open or lease_id in self._lasting

    def __iter__(self) -> Iterator[Lease]:
        yield from self._open.values()
        yield from self._lasting.values()

    def add(self, lease_id: int, tenant: int, expires_at: float, pins: array[int]) -> None:
        """`lease_id` must not be open; `expires_at` not before any earlier one's, or infinite: it lasts."""
        leases = self._lasting if expires_at == math.inf else self._open
        leases[lease_id] = Lease(tenant, expires_at, pins.tobytes())
        self._counts[tenant] += 1

    def count(self, tenant: int) -> int:
        """How many are open of this tenant."""
        return self._counts[tenant]

    def _ended(self, lease: Lease) -> Lease:
        self._counts[lease.tenant] -= 1
        return lease

    def take(self, tenant: int, lease_id: int) -> Lease | None:
        """Removes the lease and returns it; None, and nothing changes, when `tenant` has no such lease."""
        leases = self._lasting if lease_id in self._lasting else self._open
        lease = leases.get(lease_id)
        if lease is None or lease.tenant != tenant:
            return None
        return self._ended(leases.pop(lease_id))

    def take_expired(self, now: float) -> Lease | None:
        """Removes and returns one lease that has expired, the oldest; None when there is none."""
        if self._open:
            lease_id = next(iter(self._open))
            if self._open[lease_id].expires_at <= now:
                return self._ended(self._open.pop(lease_id))
        return None


class Reservation:
    """A writer's claim on a row. `writers` count copies under way; while there are any it is never reclaimed."""

    __slots__ = ("abandoned", "expires_at", "row", "tenant", "writers")

    def __init__(self, row: int, tenant: int, expires_at: float) -> None:
        self.row = row
        self.tenant = tenant
        self.expires_at = expires_at
        self.writers = 0
        self.abandoned = False


class Reservations:
    """Open reservations by id."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, Reservation] = OrderedDict()
        self._overdue: dict[int, Reservation] = {}  # expired or abandoned, but being written

    def __len__(self) -> int:
        return len(self._open) + len(self._overdue)

    def __contains__(self, reservation_id: int) -> bool:
        return reservation_id in self._open or reservation_id in self._overdue

    def __iter__(self) -> Iterator[Reservation]:
        yield from self._open.values()
        yield from self._overdue.values()

    def add(self, reservation_id: int, row: int, tenant: int, expires_at: float) -> None:
        """`reservation_id` must not be open; `expires_at` not before any earlier one's."""
        self._open[reservation_id] = Reservation(row, tenant, expires_at)

    def begin_write(self, reservation_id: int, expires_at: float) -> bool:
        """Counts a writer and renews the expiry; False when the reservation is gone."""
        reservation = self._open.get(reservation_id)
        if reservation is None:
            reservation = self._overdue.get(reservation_id)
            if reservation is None or reservation.abandoned:
                return False
            self._open[reservation_id] = self._overdue.pop(reservation_id)
        reservation.writers += 1
        reservation.expires_at = expires_at
        self._open.move_to_end(reservation_id)
        return True

    def end_write(self, reservation_id: int) -> Reservation | None:
        """Counts a writer out. Returns the reservation, removed, when it was abandoned and this was its last one."""
        reservation = self._open.get(reservation_id)
        if reservation is not None:
            reservation.writers = max(reservation.writers - 1, 0)
            return None
        reservation = self._overdue.get(reservation_id)
        if reservation is None:
            return None
        reservation.writers -= 1
        if reservation.writers:
            return None
        del self._overdue[reservation_id]
        if reservation.abandoned:
            return reservation
        self._open[reservation_id] = reservation  # it has expired already: first in line, though still committable
        self._open.move_to_end(reservation_id, last=False)
        return None

    def take(self, reservation_id: int) -> Reservation | None:
        """Removes and returns a reservation to be committed; None when it is gone or still being written."""
        reservation = self._open.get(reservation_id)
        if reservation is None or reservation.writers:
            return None
        return self._open.pop(reservation_id)

    def abandon(self, reservation_id: int) -> Reservation | None:
        """Ends a reservation: returns it, removed, or None when it is gone or waits for `end_write`."""
        reservation = self._open.pop(reservation_id, None)
        if reservation is None:
            reservation = self._overdue.get(reservation_id)
            if reservation is not None:
                reservation.abandoned = True
            return None
        if reservation.writers:
            reservation.abandoned = True
            self._overdue[reservation_id] = reservation
            return None
        return reservation

    def take_expired(self, now: float) -> Reservation | None:
        """Removes and returns one reservation that has expired and is not being written; None when there is none.
        Those being written are set aside until `end_write`, each once."""
        while self._open:
            reservation_id = next(iter(self._open))
            reservation = self._open[reservation_id]
            if reservation.expires_at > now:
                return None
            del self._open[reservation_id]
            if not reservation.writers:
                return reservation
            self._overdue[reservation_id] = reservation
        return None
