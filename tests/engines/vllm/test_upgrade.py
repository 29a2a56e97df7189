"""What the connectors implement and read against the installed vLLM: what another release changed is named here.

No engine is started: classes and their sources are compared. `OWN`, `LEFT` and `READ` are this project's side; a
release of vLLM that adds a method, renames a parameter or drops an attribute makes a test fail with its name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import mmcache_connectors.vllm as connectors

# vLLM, imported here, warns of its own dependencies.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")
FOLDER = Path(str(connectors.__file__)).parent

# Public names of a connector that vLLM does not know: for tests and for people.
OWN = {"counters"}
# By base class, what is left as it is, and why. A name that is not here and not overridden fails the test.
LEFT: dict[str, dict[str, str]] = {
    "SupportsHMA": {},
    "KVConnectorBase_V1": {
        "role": "set at construction",
        "supports_divergent_local_hybrid_hits": "recurrent state, which groups.py refuses",
        "bind_connector_metadata": "vLLM's own bookkeeping",
        "clear_connector_metadata": "vLLM's own bookkeeping",
        "has_connector_metadata": "vLLM's own bookkeeping; called here",
        "bind_kv_cache_manager": "keeps the manager, which `_evict` and `_block_ids` use",
        "bind_gpu_block_pool": "the manager has the pool",
        "get_mem_pool_context": "the paged memory may lie in vLLM's own pool",
        "set_host_xfer_buffer_ops": "for connectors that copy through vLLM's host buffers; device.py copies",
        "finish_forward": "saves are copied in wait_for_save, on the engine's own stream",
        "reset_capture_state": "nothing is changed while graphs are captured",
        "handle_preemptions": "blocks are copied out before their step ends: a preemption overwrites nothing",
        "get_finished": "get_transfer_results is called instead",
        "get_kv_connector_kv_cache_events": "no KV events are published",
        "take_events": "no KV events are published",
        "get_loaded_kv_cache_group_ids": "the groups that can be cached, which are all that groups.py takes",
        "get_external_cache_hit_sources": "one source for all tokens",
        "register_finished_partial_tail": "whole blocks only",
        "has_pending_block_frees": "no block is held for a transfer after its request",
        "has_pending_push_work": "nothing is pushed to another engine",
        "get_finished_count": "every worker reports its own part",
        "set_xfer_handshake_metadata": "the variant that knows pipeline stages is overridden",
    },
    "ECConnectorBase": {
        "role": "set at construction",
        "is_producer": "set at construction",
        "is_consumer": "set at construction",
        "bind_connector_metadata": "vLLM's own bookkeeping",
        "clear_connector_metadata": "vLLM's own bookkeeping",
        "register_caches": "for transfers between engines' memory; embeddings are put and got by content",
        "start_worker_services": "no service of the worker waits for peers",
        "start_save_caches": "nothing is pushed to another engine",
        "get_finished": "no request is held for a transfer after its end",
        "has_pending_push_work": "nothing is pushed to another engine",
    },
    "KVConnectorStats": {"to_dict": "data is a plain dict already"},
    "KVConnectorWorkerMetadata": {},
    "KVConnectorMetadata": {},
    "KVConnectorHandshakeMetadata": {},
}


def connector_classes() -> list[type]:
    """Every connector this package exports."""
    return [getattr(connectors, name) for name in connectors.__all__]


def implementations() -> list[type]:
    """The connectors, and what they send through vLLM: every class of ours with a base class of vLLM's."""
    modules = [importlib.import_module(f"{connectors.__name__}.{path.stem}") for path in sorted(FOLDER.glob("*.py"))]
    found = {cls for module in modules for cls in vars(module).values() if inspect.isclass(cls)}
    ours = [cls for cls in found if cls.__module__.startswith(connectors.__name__) and _bases(cls)]
    return sorted(ours, key=lambda cls: cls.__name__)


def _bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]


# ---------------------------------------------------------------------------------------------------------- methods
def complaints(cls: type, left: dict[str, dict[str, str]] = LEFT, *, constructed: bool = False) -> list[str]:
    """What is wrong with `cls` as an implementation of vLLM's base classes. `constructed`: vLLM calls it itself."""
    bases = _bases(cls)
    theirs = {name: (base, member) for base in reversed(bases) for name, member in vars(base).items() if _public(name)}
    starts = {name: (base, member) for base in bases for name, member in _constructor(vars(base)).items()}
    ours = {name: member for name, member in _members(cls).items() if _public(name)}
    found = [f"{name} is abstract and not implemented" for name in sorted(getattr(cls, "__abstractmethods__", ()))]
    for name, member in (ours | (_constructor(_members(cls)) if constructed else {})).items():
        if name in theirs | starts:
            base, wanted = (theirs | starts)[name]
            found += [f"{name}: {why}" for why in _differences(wanted, member, f"{base.__name__}.{name}")]
        elif callable(member) and _public(name) and name not in OWN:
            found.append(f"{name} is overridden, but vLLM has no such method any more: remove it, or list it in OWN")
    reasons = {name: base.__name__ for base in bases for name in left.get(base.__name__, {})}
    for name, (base, _) in theirs.items():
        if name not in ours and name not in reasons:
            found.append(f"{base.__name__}.{name} is new: implement it, or say in LEFT why it is left as it is")
    found += [f"{name} is in LEFT, but vLLM has it no more" for name in reasons if name not in theirs]
    found += [f"{name} is in LEFT, but overridden" for name in reasons if name in ours]
    return sorted(found)


def _public(name: str) -> bool:
    return not name.startswith("_")


def _constructor(members: Mapping[str, Any]) -> dict[str, Any]:
    return {"__init__": members["__init__"]} if "__init__" in members else {}


def _members(cls: type) -> dict[str, Any]:
    """What `cls` and its bases outside vLLM define."""
    ours = [base for base in cls.__mro__ if base not in _bases(cls) and base.__module__ != "builtins"]
    ours = [base for base in ours if base.__module__ not in ("abc", "typing")]
    return {name: member for base in reversed(ours) for name, member in vars(base).items()}


def _kind(member: Any) -> str:
    kinds = {property: "a property", classmethod: "a class method", staticmethod: "a static method"}
    return kinds.get(type(member), "a method" if inspect.isfunction(member) else "an attribute")


def _differences(theirs: Any, ours: Any, name: str) -> list[str]:
    """Why calls that fit `theirs` may not fit `ours`."""
    if _kind(theirs) != _kind(ours):
        return [f"{name} is {_kind(theirs)}, ours is {_kind(ours)}"]
    if _kind(theirs) in ("a property", "an attribute"):
        return []
    wanted, got = (inspect.signature(getattr(one, "__func__", one)).parameters for one in (theirs, ours))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = []
    kinds = {one.kind for one in got.values()}
    plain = [one for one in wanted.values() if one.kind not in variadic]
    mine = [one for one in got.values() if one.kind not in variadic]
    for place, parameter in enumerate(plain):
        if place >= len(mine) and inspect.Parameter.VAR_POSITIONAL in kinds:
            break  # handed on as they come
        if place >= len(mine) or mine[place].name != parameter.name or mine[place].kind != parameter.kind:
            there = mine[place].name if place < len(mine) else "nothing"
            found.append(f"parameter {place} is {parameter.name!r} in {name}, ours is {there!r}")
        elif parameter.default is not parameter.empty and mine[place].default is parameter.empty:
            found.append(f"parameter {parameter.name!r} has a default in {name}, ours has none")
    found += [
        f"parameter {one.name!r} is not in {name}, and has no default"
        for one in mine[len(plain) :]
        if one.default is one.empty
    ]
    return found + [
        f"{name} takes {one}, ours does not" for one in wanted.values() if one.kind in set(variadic) - kinds
    ]


def test_every_connector_and_message_is_looked_at() -> None:
    names = {cls.__name__ for cls in implementations()}
    assert names >= {cls.__name__ for cls in connector_classes()} >= {"MMCacheKVConnector"}
    assert names >= {"StepJobs", "WorkerFacts", "Dropped", "CacheStats"}


def test_the_installed_vllm_calls_what_is_implemented() -> None:
    found = {cls.__name__: complaints(cls, constructed=cls in connector_classes()) for cls in implementations()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("base", LEFT)
def test_every_reason_says_something(base: str) -> None:
    assert all(len(reason) > 10 for reason in LEFT[base].values())


class _Base:
    """Stands for a vLLM class: see the test below."""

    def __init__(self, config: Any) -> None: ...

    @property
    def delivers(self) -> bool:
        return True

    @classmethod
    def layout(cls, config: Any) -> str:
        return "x"

    def load(self, context: Any, **kwargs: Any) -> None: ...

    def match(self, request: Any, computed: int = 0) -> int:
        return computed

    def fresh(self) -> None: ...


_Base.__module__ = "vllm.somewhere"


class _Wrong(_Base):
    def __init__(self) -> None: ...

    delivers = None  # type: ignore[assignment]

    def layout(self, config: Any) -> str:  # type: ignore[override]
        return "x"

    def load(self, context: Any) -> None: ...  # type: ignore[override]

    def match(self, computed: int, request: Any, more: int) -> int:  # type: ignore[override]
        return more

    def gone(self) -> None: ...


class _Right(_Base):
    def match(self, request: Any, computed: int = 0, more: int = 0) -> int:
        return computed + more


def test_the_check_of_methods_can_fail() -> None:
    assert complaints(_Wrong, {"_Base": {"match": "a reason", "went": "a reason"}}, constructed=True) == [
        "_Base.fresh is new: implement it, or say in LEFT why it is left as it is",
        "__init__: parameter 1 is 'config' in _Base.__init__, ours is 'nothing'",
        "delivers: _Base.delivers is a property, ours is an attribute",
        "gone is overridden, but vLLM has no such method any more: remove it, or list it in OWN",
        "layout: _Base.layout is a class method, ours is a method",
        "load: _Base.load takes **kwargs: 'Any', ours does not",
        "match is in LEFT, but overridden",
        "match: parameter 'more' is not in _Base.match, and has no default",
        "match: parameter 1 is 'request' in _Base.match, ours is 'computed'",
        "match: parameter 2 is 'computed' in _Base.match, ours is 'request'",
        "went is in LEFT, but vLLM has it no more",
    ]
    assert complaints(_Right, {"_Base": dict.fromkeys(("delivers", "layout", "load", "fresh"), "a reason")}) == []
    abstract = type("Abstract", (_bases(connector_classes()[0])[0],), {})
    assert "build_connector_meta is abstract and not implemented" in complaints(abstract)


# ------------------------------------------------------------------------------------------------------- attributes
# What an expression stands for: in every module ("*"), in some, or in one function; any of several classes.
ATTENTION = tuple(
    f"vllm.v1.kv_cache_interface.{name}"
    for name in ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec")
)
REQUEST, LORA = ("vllm.v1.request.Request",), ("vllm.lora.request.LoRARequest",)
READ: dict[str, dict[str, tuple[str, ...]]] = {
    "*": {
        "request": REQUEST,
        "tracked.request": REQUEST,
        "request.lora_request": LORA,
        "feature": ("vllm.multimodal.inputs.MultiModalFeatureSpec",),
        "position": ("vllm.multimodal.inputs.PlaceholderRange",),
        "element": ("vllm.multimodal.inputs.MultiModalFieldElem",),
        "scheduler_output": ("vllm.v1.core.sched.output.SchedulerOutput",),
        "vllm_config": ("vllm.config.VllmConfig",),
        "vllm_config.cache_config": ("vllm.config.CacheConfig",),
        "vllm_config.model_config": ("vllm.config.ModelConfig",),
        "vllm_config.compilation_config": ("vllm.config.CompilationConfig",),
        "parallel": ("vllm.config.ParallelConfig",),
        "kv_cache_config": ("vllm.v1.kv_cache_interface.KVCacheConfig",),
    },
    "[al]*.py": {"lora": LORA},
    "connector.py": {
        "cached": ("vllm.v1.core.sched.output.CachedRequestData",),
        "connector_output": ("vllm.v1.outputs.KVConnectorOutput",),
        "blocks": ("vllm.v1.core.kv_cache_manager.KVCacheBlocks",),
        "forward_context": ("vllm.forward_context.ForwardContext",),
        "self._kv_cache_manager": ("vllm.v1.core.kv_cache_manager.KVCacheManager",),
        "pool": ("vllm.v1.core.block_pool.BlockPool",),
        "self._kv_transfer_config": ("vllm.config.KVTransferConfig",),
        "config": ("vllm.config.KVTransferConfig",),
    },
    "connector.py:_plan_saves": {"one": ("vllm.v1.core.sched.output.NewRequestData",)},
    "engine.py:__init__": {"spec": ATTENTION},
    "groups.py:read_groups": {"group": ("vllm.v1.kv_cache_interface.KVCacheGroupSpec",), "spec": ATTENTION},
    "groups.py:groups_fact": {"spec": ATTENTION},
}


def attributes_read(tree: ast.AST, expression: str) -> set[str]:
    """Every attribute that `tree` reads of what it calls `expression`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == expression
    }


def attributes_of(cls: type) -> set[str]:
    """What instances of `cls` have: members, fields, and what its methods assign to self."""
    found = set(dir(cls))
    for base in cls.__mro__[:-1]:
        found |= set(inspect.get_annotations(base))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # no source: an extension or generated
            continue
        found |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
        }
    return found


def missing(tree: ast.AST, table: dict[str, tuple[str, ...]], load: Callable[[str], type]) -> list[str]:
    """Attributes that are read, but that the class does not have; entries of the table that nothing reads."""
    found = []
    for expression, classes in table.items():
        names = attributes_read(tree, expression)
        found += [f"nothing is read of {expression} any more: take it out of READ"] if not names else []
        for path in classes:
            found += [f"{path} has no {name}, which is read" for name in sorted(names - attributes_of(load(path)))]
    return found


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _tree(place: str) -> ast.AST:
    file, _, function = place.partition(":")
    trees = [ast.parse(path.read_text()) for path in sorted(FOLDER.glob(file if file != "*" else "*.py"))]
    whole = ast.Module([part for tree in trees for part in tree.body], [])
    if not function:
        return whole
    return next(node for node in ast.walk(whole) if isinstance(node, ast.FunctionDef) and node.name == function)


@pytest.mark.parametrize("place", READ)
def test_what_is_read_of_vllms_objects_is_there(place: str) -> None:
    assert missing(_tree(place), READ[place], _class) == []


def test_the_check_of_attributes_can_fail() -> None:
    tree = ast.parse("request.request_id; request.colour; other.x")
    assert missing(tree, {"request": ("Request",), "cached": ("Request",)}, lambda _: _class(*REQUEST)) == [
        "Request has no colour, which is read",
        "nothing is read of cached any more: take it out of READ",
    ]


def test_what_connectors_use_of_themselves_is_theirs_or_a_base_classs() -> None:
    for cls in connector_classes():
        read = attributes_read(ast.parse(textwrap.dedent(inspect.getsource(cls))), "self")
        assert read - attributes_of(cls) == set()
        assert read - attributes_of(object) >= {"_client"}
