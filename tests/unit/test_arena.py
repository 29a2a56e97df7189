"""The arena's seals hold against every way to a writable map, and its size is bounded by real limits."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmcache
from mmcache.config import ServerConfig
from mmcache.errors import StoreError
from mmcache.keys import Namespace, opaque_key
from mmcache.server.serve import Server
from mmcache.store.arena import MEMORY_SHARE, Arena, check_huge_pages, memory_left_nbytes

NBYTES = 2 << 20
GiB = 1 << 30


ALONE = pytest.mark.alone  # how many huge pages there are is one number for the whole machine


@pytest.fixture(
    params=["lazy", "prefault", pytest.param("huge", marks=ALONE), pytest.param("huge prefault", marks=ALONE)]
)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    with huge_pages() if "huge" in request.param else contextlib.nullcontext():
        built = Arena(NBYTES, prefault="prefault" in request.param, huge_pages="huge" in request.param)
        yield built
        built.close()


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Four MiB of huge pages; if they are not set aside, and this may, they are for as long as the block runs."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    before = setting.read_text()
    try:
        check_huge_pages(2 * NBYTES)
        yield
        return
    except StoreError:
        pass
    try:
        try:
            setting.write_text(str(int(before) + 2))
            check_huge_pages(2 * NBYTES)
        except (OSError, StoreError) as error:
            pytest.skip(f"no huge page can be set aside here: {error}")
        yield
    finally:
        with contextlib.suppress(OSError):
            setting.write_text(before)


@pytest.fixture
def reopened(arena: Arena) -> Iterator[int]:
    """What a client that was handed the descriptor can make of it: its own open file, for reading and writing."""
    fd = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDWR)
    yield fd
    os.close(fd)


def refused(fd: int) -> contextlib.AbstractContextManager[object]:
    """Of huge pages nothing is written through a descriptor, nor a part of one cut off: that is said first."""
    if os.fstat(fd).st_blksize == mmap.PAGESIZE:
        return pytest.raises(PermissionError)
    return pytest.raises(OSError, match=r"Operation not permitted|Invalid argument")


def test_the_server_writes_and_a_client_reads(arena: Arena, reopened: int) -> None:
    arena.view[NBYTES - 3 :] = b"end"
    with mmap.mmap(reopened, NBYTES, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as seen:
        assert seen[NBYTES - 3 :] == b"end"
        arena.view[0] = 7
        assert seen[0] == 7


@pytest.mark.parametrize("own", [True, False], ids=["the descriptor itself", "reopened"])
def test_no_other_map_can_be_writable(arena: Arena, reopened: int, own: bool) -> None:
    fd = arena.fd if own else reopened
    with pytest.raises(PermissionError):
        mmap.mmap(fd, NBYTES, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_readers_map_cannot_be_made_writable_later(arena: Arena, reopened: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, NBYTES, mmap.PROT_READ, mmap.MAP_SHARED, reopened, 0)
    try:
        assert libc.mprotect(address, NBYTES, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
    finally:
        libc.munmap(address, NBYTES)


def test_a_private_map_changes_nothing(arena: Arena, reopened: int) -> None:
    flags, writable = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
    with mmap.mmap(reopened, NBYTES, flags=flags, prot=writable) as private:
        private[0] = 1
    assert arena.view[0] == 0


def test_it_cannot_be_written_through_a_descriptor(arena: Arena, reopened: int) -> None:
    for fd in (arena.fd, reopened):
        with refused(fd):
            os.pwrite(fd, b"x", 0)
    assert arena.view[0] == 0


@pytest.mark.parametrize("nbytes", [0, NBYTES - 1, NBYTES + 1, 2 * NBYTES])
def test_its_size_cannot_change(arena: Arena, reopened: int, nbytes: int) -> None:
    for fd in (arena.fd, reopened):
        with refused(fd):
            os.ftruncate(fd, nbytes)
    assert os.fstat(arena.fd).st_size == NBYTES


def test_its_pages_cannot_be_punched_out(arena: Arena, reopened: int) -> None:
    arena.view[0] = 9
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    keep_size, punch_hole = 1, 2
    assert libc.fallocate(reopened, keep_size | punch_hole, 0, 4096) == -1
    assert ctypes.get_errno() == errno.EPERM
    assert arena.view[0] == 9


def test_its_seals_are_final(arena: Arena, reopened: int) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(reopened, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_closing_leaves_views_still_held_alone() -> None:
    arena = Arena(NBYTES)
    arena.view[5] = 5
    held = arena.view[4:8]
    arena.close()
    assert bytes(held) == b"\0\5\0\0"


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    write(folder / "meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {8 << 20} kB")
    return folder


def test_without_cgroups_it_is_what_the_machine_has_left(tmp_path: Path, proc: Path) -> None:
    assert memory_left_nbytes(tmp_path / "none", proc) == (8 * GiB, f"{proc}/meminfo")


def test_the_tightest_of_the_v2_cgroups_around_counts(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "cgroup"
    write(proc / "self/cgroup", "0::/kubepods/pod/container")
    write(root / "kubepods/memory.max", 6 * GiB)
    write(root / "kubepods/memory.current", GiB)
    write(root / "kubepods/pod/memory.max", 3 * GiB)
    write(root / "kubepods/pod/memory.current", GiB)
    write(root / "kubepods/pod/container/memory.max", "max")
    write(root / "kubepods/pod/container/memory.current", GiB)
    assert memory_left_nbytes(root, proc) == (2 * GiB, str(root / "kubepods/pod/memory.max"))


def test_a_v2_container_sees_its_limit_at_the_root(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "cgroup"
    write(proc / "self/cgroup", "0::/")
    write(root / "memory.max", 2 * GiB)
    write(root / "memory.current", GiB // 2)
    assert memory_left_nbytes(root, proc) == (3 * GiB // 2, str(root / "memory.max"))


@pytest.mark.parametrize("path", ["/", "/docker/0123", "/../outside"])
def test_a_v1_memory_controller_counts_wherever_it_is_mounted(tmp_path: Path, proc: Path, path: str) -> None:
    root = tmp_path / "cgroup"
    write(proc / "self/cgroup", f"12:cpu,cpuacct:/other\n7:memory,hugetlb:{path}\n1:name=systemd:/x")
    write(root / "memory/memory.limit_in_bytes", GiB)
    write(root / "memory/memory.usage_in_bytes", GiB // 4)
    write(root / "other/memory.max", 1)
    assert memory_left_nbytes(root, proc) == (3 * GiB // 4, str(root / "memory/memory.limit_in_bytes"))


def test_a_v1_cgroup_without_a_limit_leaves_it_to_the_machine(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "cgroup"
    write(proc / "self/cgroup", "7:memory:/")
    write(root / "memory/memory.limit_in_bytes", 9223372036854771712)
    write(root / "memory/memory.usage_in_bytes", GiB)
    assert memory_left_nbytes(root, proc)[0] == 8 * GiB


def test_a_cgroup_over_its_limit_leaves_nothing(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "cgroup"
    write(proc / "self/cgroup", "0::/")
    write(root / "memory.max", GiB)
    write(root / "memory.current", GiB + 1)
    assert memory_left_nbytes(root, proc)[0] == 0


@pytest.mark.parametrize(
    ("base", "limit", "used", "line"),
    [("", "memory.max", "memory.current", "inactive_file"),
     ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")],
)  # fmt: skip
def test_file_pages_that_would_be_dropped_do_not_count_as_used(
    tmp_path: Path, proc: Path, base: str, limit: str, used: str, line: str
) -> None:
    root = tmp_path / "cgroup"
    write(root / base / limit, 2 * GiB)
    write(root / base / used, GiB)
    write(root / base / "memory.stat", f"anon 1\n{line} {GiB // 4}\nactive_file {GiB}\n")
    write(proc / "self/cgroup", "0::/\n" if not base else "4:memory:/\n")
    assert memory_left_nbytes(root, proc)[0] == GiB + GiB // 4


def test_the_real_files_of_this_machine_are_understood() -> None:
    left, source = memory_left_nbytes()
    assert 0 < left < 1 << 50
    assert Path(source).exists()


def test_an_arena_over_the_limit_names_the_limit_and_the_remedy() -> None:
    left, source = memory_left_nbytes()
    with pytest.raises(StoreError, match=r"give it less \(--memory") as refusal:
        Arena(2 * left)
    assert source in str(refusal.value)
    assert f"{MEMORY_SHARE:.0%}" in str(refusal.value)


LEAVES = """
import os
from mmcache.errors import StoreError
from mmcache.store.arena import Arena, memory_left_nbytes
def build(nbytes):
    try:
        Arena(nbytes).close()
    except StoreError:
        return False
    return True
counts = [len(os.listdir("/proc/self/fd"))]
built = [build(nbytes) for nbytes in (2 * memory_left_nbytes()[0], 2 << 20, 2 << 20, 2 << 20)]
counts.append(len(os.listdir("/proc/self/fd")))
print(built, counts[1] - counts[0])
"""


def test_no_descriptor_is_left_behind_when_it_cannot_be_built() -> None:
    """In a process of its own: threads of other tests open and close some here."""
    said = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, check=True).stdout
    assert said == "[False, True, True, True] 0\n"


def test_huge_pages_that_cannot_be_had_say_what_to_do(tmp_path: Path) -> None:
    left = "Hugepagesize:       2048 kB\nHugePages_Free:      {}\nHugePages_Rsvd:        {}\n"
    for text, nbytes, words in (
        ("MemTotal: 1 kB\n", NBYTES, "no huge pages"),
        (left.format(9, 0), NBYTES + 4096, "a multiple of 2MiB"),
        (left.format(9, 7), 3 * NBYTES, "3 huge pages are needed and 2 are free"),
    ):
        (tmp_path / "meminfo").write_text(text)
        with pytest.raises(StoreError, match=words):
            check_huge_pages(nbytes, tmp_path)
    check_huge_pages(2 * NBYTES, tmp_path)


@ALONE
def test_a_server_on_huge_pages_answers_through_shared_memory() -> None:
    with huge_pages():
        config = ServerConfig(listen="127.0.0.1:0", memory_nbytes=NBYTES, huge_pages=True, prefault=True)
        server = Server(config)
        server.start()
        try:
            assert server.address is not None
            with mmcache.connect("mmcache://{}:{}".format(*server.address)) as client:
                key = opaque_key(Namespace(kind="kv", model="m", dtype="uint8", layout="flat", block_size=1), b"1")
                assert client.put([key], [bytes(1000)])[0].outcome == "stored"
                found = bytearray(b"x" * 1000)
                assert client.get_into([key], [found])[0]
                assert found == bytes(1000)
                assert client.stat()["transport"] == "shm"
        finally:
            server.stop()
