"""Values without bytes: what a key's value looks like in an arena of cells, and what a reader makes of cells it finds.

A value is its key's digest: cell after cell says whose it is and which piece. So a torn, foreign or overwritten value
is seen, and no memory is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mmcache.store.answers import Found

CELL_NBYTES: Final = 64
MOST_CELLS: Final = 4
HEADER_NBYTES: Final = 40
_PIECES: Final = 16


class Values:
    """The numbers of keys' digests, so that a cell is one number."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._digests: list[bytes] = []

    def cells(self, digest: bytes) -> int:
        """How many cells the value of this key takes."""
        return 1 + digest[0] % MOST_CELLS

    def nbytes(self, digest: bytes) -> int:
        """Its size; its last cell is not full."""
        return self.cells(digest) * CELL_NBYTES - digest[1] % 20

    def content(self, digest: bytes) -> list[int]:
        """What its cells hold; none is 0, which nobody has written to."""
        number = self._numbers.get(digest)
        if number is None:
            self._digests.append(digest)
            number = self._numbers[digest] = len(self._digests)
        return [number * _PIECES + piece for piece in range(self.cells(digest))]

    def whose(self, cells: Sequence[int]) -> bytes | None:
        """The key whose whole value this is; None: it is nobody's."""
        number = cells[0] // _PIECES if cells else 0
        if not number:
            return None
        digest = self._digests[number - 1]
        return digest if list(cells) == self.content(digest) else None

    def at(self, cells: Sequence[int], place: Found) -> bytes | None:
        """Whose value a reader sees there."""
        first = place.offset // CELL_NBYTES
        return self.whose(cells[first : first - (-place.nbytes // CELL_NBYTES)])


def checksum(digest: bytes) -> bytes:
    """Of the value of this key: what its writer tells, and its readers compare."""
    return digest[16:]
