"""Generates mmcache/pb/*_pb2.py and .pyi from the schemas under proto/; --check only tells whether they are stale.

The generator is pinned: what newer ones write does not load on protobuf 5.29, and what this one writes loads on
protobuf 5.29, 6 and 7, which the engines mmcache is installed beside do not agree on.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path

GENERATOR = "1.71.2"
REMEDY = f"install grpcio-tools=={GENERATOR} (Python 3.11 to 3.13): `make check` does, into .venv"
ROOT = Path(__file__).resolve().parents[1]


def generate(proto_root: Path) -> dict[Path, bytes]:
    """The generated files for every schema under `proto_root`, by path relative to the directory that holds `mmcache`.

    Raises RuntimeError, having written nothing, when there is no schema, protoc refuses one, or grpcio-tools is not
    the pinned version.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise RuntimeError(f"grpcio-tools cannot be imported ({error}); {REMEDY}") from None
    installed = metadata.version("grpcio-tools")
    if installed != GENERATOR:
        raise RuntimeError(f"grpcio-tools is {installed}; {REMEDY}")
    schemas = sorted(str(path.relative_to(proto_root)) for path in proto_root.rglob("*.proto"))
    if not schemas:
        raise RuntimeError(f"no .proto file under {proto_root}; pass the right --proto")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{proto_root}", f"--python_out={scratch}", f"--pyi_out={scratch}", *schemas]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc refused a schema, as it says above; mend the schema and run this again")
        out = Path(scratch)
        return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*_pb2.py*"))}


def stale(files: dict[Path, bytes], root: Path) -> list[Path]:
    """The paths whose committed bytes differ from `files`, and committed generated files no schema accounts for."""
    differing = [
        path for path, data in files.items() if not (root / path).is_file() or (root / path).read_bytes() != data
    ]
    committed = (
        path.relative_to(root) for path in (root / "mmcache").rglob("*_pb2.py*") if path.suffix in (".py", ".pyi")
    )
    return sorted({*differing, *(path for path in committed if path not in files)})


def main(argv: list[str] | None = None) -> int:
    """Exit status 0: written, or (--check) in sync. 1: stale, or nothing could be generated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a committed file is stale")
    parser.add_argument(
        "--proto", type=Path, default=ROOT / "proto", help="where the schemas are (default: %(default)s)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="directory that holds mmcache/ (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        files = generate(options.proto)
    except RuntimeError as error:
        print(f"generate_pb: {error}", file=sys.stderr)
        return 1
    changed = stale(files, options.root)
    if options.check:
        for path in changed:
            print(f"generate_pb: {path} is stale; run .venv/bin/python scripts/generate_pb.py", file=sys.stderr)
        return 1 if changed else 0
    for path in changed:
        if path not in files:
            (options.root / path).unlink()
            print(f"removed {path}")
            continue
        (options.root / path).parent.mkdir(parents=True, exist_ok=True)
        (options.root / path).write_bytes(files[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
