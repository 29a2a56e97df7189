"""Golden files: compare every vector of a JSON file, fill in new ones, never overwrite one that is there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def run(
    description: str,
    file: Path,
    evaluate: Callable[[Mapping[str, Any]], Any],
    arguments: list[str] | None = None,
    difference: Callable[[Any, Any], str] = "expected {}, got {}".format,
) -> int:
    """The command line of a golden-file script: 0 if all vectors of the file are what `evaluate` makes of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help='fill in vectors whose "expected" is null')
    parser.add_argument("--file", type=Path, default=file, help=f"the vectors (default: {file.name})")
    options = parser.parse_args(arguments)
    document = json.loads(options.file.read_text())
    changed = []
    for vector in document["vectors"]:
        found = evaluate(vector)
        if vector["expected"] is None and options.write:
            vector["expected"] = found
        elif vector["expected"] != found:
            changed.append(vector["name"])
            print(f"{vector['name']}: {difference(vector['expected'], found)}", file=sys.stderr)
    if changed:
        print(f"{len(changed)} vectors differ: mend the code; a change on purpose sets them to null", file=sys.stderr)
        return 1
    if options.write:
        options.file.write_text(render(document))
    print(f"{len(document['vectors'])} vectors agree")
    return 0


def render(document: Mapping[str, Any]) -> str:
    """The file's text: one vector a line."""
    head = json.dumps({name: value for name, value in document.items() if name != "vectors"}, indent=1)
    lines = ",\n".join(json.dumps(vector) for vector in document["vectors"])
    return f'{head.rstrip().removesuffix("}").rstrip()},\n "vectors": [\n{lines}\n]\n}}\n'
