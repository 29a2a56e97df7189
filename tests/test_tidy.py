"""The house rules a formatter cannot see, over every file of the repository.

Each rule is a function from a file to a list of complaints, so that `test_a_rule_can_fail` can show it a bad file.
What may import what is import-linter's (pyproject.toml); here is only what it cannot say.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
MAX_PUBLIC_NAMES = 15
INSTALLED = {"__pycache__", "node_modules"}

PURE = {
    "mmcache.bench.html",
    "mmcache.bench.page",
    "mmcache.bench.plots",
    "mmcache.bench.samples",
    "mmcache.bench.serving_page",
    "mmcache.bench.serving_text",
    "mmcache.bench.stream",
    "mmcache.bench.transfer_page",
    "mmcache.bench.transfer_rows",
    "mmcache.keys",
    "mmcache.media",
    "mmcache.frame",
    "mmcache.frame_run",
    "mmcache.frame_view",
    "mmcache.hashing",
    "mmcache.store.answers",
    "mmcache.store.explain",
    "mmcache.store.history",
    "mmcache.store.ledger",
    "mmcache.store.journal",
    "mmcache.store.kept",
    "mmcache.store.notes",
    "mmcache.store.restore",
    "mmcache.store.namespaces",
    "mmcache.store.sweep",
    "mmcache.store.usage",
    "mmcache.store.uses",
    "mmcache.store.columns",
    "mmcache.store.index",
    "mmcache.store.integrity",
    "mmcache.store.leases",
    "mmcache.store.rows",
    "mmcache.store.table",
    "mmcache.store.policy",
    "mmcache.store.policies",
    "mmcache.store.s3fifo",
    "mmcache.store.value",
    "mmcache.store.hazard",
    "mmcache.store.ghosts",
    "mmcache.store.extents",
    "mmcache.cluster.absent",
    "mmcache.cluster.beats",
    "mmcache.cluster.heat",
    "mmcache.cluster.homes",
    "mmcache.cluster.placement",
    "mmcache.cluster.routes",
    "mmcache.cluster.search",
    "mmcache.cluster.seen",
    "mmcache.cluster.slices",
    "mmcache.server.access_edit",
    "mmcache.server.caller",
    "mmcache.server.grants",
    "mmcache.size.fields",
    "mmcache.size.kv",
    "mmcache.size.media",
    "mmcache.size.sheet",
    "mmcache.units",
    "mmcache.why",
    "mmcache.client.cluster_steps",
    "mmcache.client.plan",
    "mmcache.client.protocol",
    "mmcache.client.sending",
}
WIRE = {"mmcache.client.protocol", "mmcache.client.sending"}  # what of the pure modules speaks the wire protocol
IMPURE = {"asyncio", "time", "random", "os", "socket", "threading", "grpc", "torch", "pyarrow"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load"}
# What a distribution is imported as, where that is not its own name.
IMPORT_NAMES = {
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "protobuf": "google",
    "scikit-image": "skimage",
}
# The extra that a module of its own needs.
EXTRAS = {"mmcache.cluster.kubernetes_members": "kubernetes", "mmcache.cluster.redis_link": "cluster"}
FRAGMENT = re.compile(
    r"(?:\d+|\+[a-z0-9][a-z0-9-]*)\.(?:"
    + "|".join(kind["directory"] for kind in PYPROJECT["tool"]["towncrier"]["type"])
    + r")(?:\.\d+)?\.md"
)
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|home|Users)/\w")
REGISTRY_HOST = re.compile(
    r"pypi\.(?:org|python)|pythonhosted\.|download\.pytorch\.|conda\.anaconda\.|--(?:extra-)?index-url"
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def repository_files() -> Iterator[Path]:
    """Every file that is, or could be, committed: no environment, cache or build output."""
    for top in sorted(ROOT.iterdir()):
        if top.is_file() and not top.name.startswith(".coverage"):
            yield top
        elif top.name not in {"build", "dist", "htmlcov"} and (top.name in {".ci", ".github"} or top.name[0] != "."):
            yield from (path for path in sorted(top.rglob("*")) if path.is_file() and INSTALLED.isdisjoint(path.parts))


FILES = list(repository_files())
GENERATED = [path for path in FILES if path.name.endswith(("_pb2.py", "_pb2.pyi"))]
SOURCES = [path for path in FILES if path.suffix == ".py" and path not in GENERATED]
PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "mmcache")]
CONNECTORS = [path for path in SOURCES if path.is_relative_to(ROOT / "connectors")]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Every absolute module an import statement anywhere in `tree` names; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def too_long(path: Path, text: str) -> list[str]:
    """A file over MAX_FILE_LINES, functions over MAX_FUNCTION_LINES (decorators not counted)."""
    complaints = []
    if (lines := text.count("\n")) > MAX_FILE_LINES:
        complaints.append(f"{lines} lines in a file; the limit is {MAX_FILE_LINES}: split it")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                complaints.append(f"{node.name} has {lines} lines; the limit is {MAX_FUNCTION_LINES}: split it")
    return complaints


def undocumented(path: Path, text: str) -> list[str]:
    """A file that does not open with what lives there."""
    return [] if ast.get_docstring(ast.parse(text)) else ["no opening docstring: say what lives here"]


def unsafe(path: Path, text: str) -> list[str]:
    """Code execution from data, and the builtin hash(), which differs from process to process, outside __hash__."""
    tree = ast.parse(text)
    complaints = [f"imports {name}" for name in imports(tree) if name.split(".")[0] in UNSAFE_MODULES]
    hashers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__hash__"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS or (called == "hash" and id(node) not in hashers):
                complaints.append(f"line {node.lineno} calls {called}()")
    return complaints


def impure(path: Path, text: str) -> list[str]:
    """A PURE module that imports what acts: I/O, clocks, randomness, threads, schemas (client.protocol may)."""
    module = module_of(path)
    if module not in PURE:
        return []
    banned = IMPURE if module in WIRE else IMPURE | {"mmcache.pb"}
    return [
        f"{module} imports {name}"
        for name in sorted(imports(ast.parse(text)))
        if any(name == bad or name.startswith(f"{bad}.") for bad in banned)
    ]


def torch_outside_tensors(path: Path, text: str) -> list[str]:
    """torch imported anywhere in the package but in tensors.py."""
    if module_of(path) == "mmcache.tensors":
        return []
    return [f"imports {name}" for name in imports(ast.parse(text)) if name.split(".")[0] == "torch"]


def undeclared(path: Path, text: str) -> list[str]:
    """Imports that no dependency in pyproject.toml brings: the base ones anywhere, an extra's where it is used."""
    project = PYPROJECT["project"]
    declared = list(project["dependencies"])
    if path.is_relative_to(ROOT / "mmcache" / "bench"):
        declared += project["optional-dependencies"]["bench"] + project["optional-dependencies"]["media"]
    if module_of(path) in ("mmcache.server.rpc", "mmcache.transport.rpc"):
        declared += project["optional-dependencies"]["grpc"]
    declared += project["optional-dependencies"][EXTRAS[module_of(path)]] if module_of(path) in EXTRAS else []
    names = {Requirement(text).name for text in declared}
    known = {IMPORT_NAMES.get(name, name) for name in names} | set(sys.stdlib_module_names) | {"mmcache"}
    if module_of(path) == "mmcache.tensors":
        known.add("torch")
    return sorted({f"imports {name}" for full in imports(ast.parse(text)) if (name := full.split(".")[0]) not in known})


def leaks(path: Path, text: str) -> list[str]:
    """Paths of somebody's machine, and package registries: both belong to where mmcache is installed."""
    return [f"has {hit.group()!r}" for rule in (MACHINE_PATH, REGISTRY_HOST) for hit in rule.finditer(text)]


def anchors(text: str) -> set[str]:
    """The fragment of every heading, as the usual renderers make it."""
    headings = re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links to a file, or to a heading, that is not there."""
    complaints = []
    for match in LINK.finditer(FENCE.sub("", text)):
        link = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", link):
            continue
        target, _, fragment = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists():
            complaints.append(f"links to {link}, which does not exist")
        elif fragment and fragment not in anchors(text if file == path else file.read_text()):
            complaints.append(f"links to {link}: no such heading there")
    return complaints


Rule = Callable[[Path, str], list[str]]
RULES: list[tuple[Rule, list[Path]]] = [
    (too_long, SOURCES),
    (undocumented, SOURCES),
    (unsafe, PACKAGE + CONNECTORS),
    (impure, PACKAGE),
    (torch_outside_tensors, PACKAGE),
    (undeclared, PACKAGE),
    (leaks, FILES),
    (broken_links, DOCUMENTS),
]


@pytest.mark.parametrize(("rule", "files"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_every_file_keeps_the_rule(rule: Rule, files: list[Path]) -> None:
    assert files
    texts = ((path, path.read_bytes().decode(errors="replace")) for path in files)
    assert [f"{name_of(path)}: {complaint}" for path, text in texts for complaint in rule(path, text)] == []


BAD = [
    (too_long, "x.py", '"""Doc."""\n' + "x = 1\n" * MAX_FILE_LINES, "401 lines in a file"),
    (too_long, "x.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f has 71 lines"),
    (too_long, "x.py", "class A:\n  async def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f has 71 lines"),
    (undocumented, "x.py", "x = 1\n", "no opening docstring"),
    (unsafe, "x.py", "def f():\n    from pickle import loads\n", "imports pickle"),
    (unsafe, "x.py", "y = hash(b'') % 7\n", "calls hash()"),
    (unsafe, "x.py", "import torch\ny = torch.load('x')\n", "calls torch.load()"),
    (unsafe, "x.py", "y = eval('1')\n", "calls eval()"),
    (impure, "mmcache/keys.py", "import os.path\n", "mmcache.keys imports os.path"),
    (impure, "mmcache/frame.py", "def f():\n    from mmcache import pb\n", "mmcache.frame imports mmcache.pb"),
    (torch_outside_tensors, "mmcache/cli.py", "def f():\n    import torch.nn\n", "imports torch.nn"),
    (undeclared, "mmcache/cli.py", "import click\n", "imports click"),
    (undeclared, "mmcache/media.py", "import PIL.Image\n", "imports PIL"),
    (leaks, "x.md", "see " + "/".join(["", "home", "someone", "data"]), "has '/"),
    (leaks, "x.md", "pip install --extra-" + "index-url https://example.net", "-url'"),
    (broken_links, "CONTRIBUTING.md", "[a](docs/no-such-file.md)", "does not exist"),
    (broken_links, "CONTRIBUTING.md", "# A b\n[a](#a-c)", "no such heading"),
]


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), BAD)
def test_a_rule_can_fail(rule: Rule, name: str, text: str, complaint: str) -> None:
    assert any(complaint in found for found in rule(ROOT / name, text))


GOOD = [
    (too_long, "x.py", "x = 1\n" * MAX_FILE_LINES),
    (unsafe, "x.py", "class A:\n    def __hash__(self) -> int:\n        return hash(self.digest)\n"),
    (impure, "mmcache/client/protocol.py", "from mmcache.pb import cache_pb2\n"),
    (impure, "mmcache/store/arena.py", "import os\n"),
    (undeclared, "mmcache/bench/corpus.py", "import PIL.Image\nimport av\n"),
    (leaks, "x.md", "curl https://example.net/home/a; $TMP/work; a/root/b"),
    (
        broken_links,
        "CONTRIBUTING.md",
        "# A b\n[a](#a-b) [b](pyproject.toml) [c](https://example.net)\n```\n[d](nowhere.md)\n```\n",
    ),
]


@pytest.mark.parametrize(("rule", "name", "text"), GOOD)
def test_a_rule_accepts_good_files(rule: Rule, name: str, text: str) -> None:
    assert rule(ROOT / name, text) == []


def test_import_contracts_cover_every_pure_module() -> None:
    contracts = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    assert set(contracts["pure"]["source_modules"]) == PURE
    assert set(contracts["pure"]["forbidden_modules"]) == IMPURE
    assert set(contracts["pure-pb"]["source_modules"]) == PURE - WIRE
    assert set(map(module_of, PACKAGE)) >= PURE


def test_public_names_are_few_and_sorted() -> None:
    tree = ast.parse((ROOT / "mmcache" / "__init__.py").read_text())
    listed = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    assert len(listed) == 1
    (names,) = listed
    assert names == sorted(set(names))
    assert len([name for name in names if not name.startswith("__")]) <= MAX_PUBLIC_NAMES
    bound = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(names) <= bound


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="the pinned generator is not installed here")
def test_generated_code_is_in_sync(tmp_path: Path) -> None:
    assert GENERATED
    generate = [sys.executable, str(ROOT / "scripts" / "generate_pb.py")]
    fresh = subprocess.run([*generate, "--check"], capture_output=True, text=True, check=False)
    assert (fresh.returncode, fresh.stderr) == (0, "")
    stale = subprocess.run([*generate, "--check", "--root", str(tmp_path)], capture_output=True, text=True, check=False)
    assert stale.returncode == 1
    assert "is stale" in stale.stderr
    subprocess.run([*generate, "--root", str(tmp_path)], capture_output=True, check=True)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2.py*")} == {
        path.relative_to(ROOT) for path in GENERATED
    }


def test_changelog_fragments_are_well_named() -> None:
    fragments = {path.name for path in FILES if path.parent == ROOT / "changelog.d"} - {"README.md"}
    assert [name for name in sorted(fragments) if not FRAGMENT.fullmatch(name)] == []
    assert FRAGMENT.fullmatch("2.added.md")
    assert FRAGMENT.fullmatch("+content-keys.fixed.1.md")
    assert not FRAGMENT.fullmatch("content keys.txt")
    assert not FRAGMENT.fullmatch("2.improved.md")
