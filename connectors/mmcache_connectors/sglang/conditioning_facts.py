"""The namespace of a diffusion worker's prompt embeddings: everything but the prompt that decides them. Imports SGLang.

An argument that is not named OUT is in, so is a new one. What is out names addresses, files that are written to, what
is reported, the order and the batching of work: nothing an embedding's bytes depend on, as a batch's tokens are all in
its name.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

import sglang
import torch
import transformers

from mmcache.errors import ConfigError
from mmcache.keys import Namespace
from mmcache_connectors.sglang import facts
from mmcache_connectors.sglang.weights import REMEDY, Contents, process_start_s

OUT: Final = frozenset(
    {
        "_explicit_arg_names",  # which arguments were given; what came of them is in
        "async_output_save",
        "base_gpu_id",
        "batching_config",
        "batching_delay_ms",
        "batching_max_size",
        "batching_mode",
        "conditioning_cache_max_size_mb",
        "disable_conditioning_cache",
        "disagg_server_addr",
        "dist_init_addr",
        "dist_timeout",
        "enable_batching_metrics",
        "enable_cache_report",
        "enable_metrics",
        "enable_trace",
        "gpu_ids",
        "host",
        "http_graceful_shutdown_timeout",
        "input_save_path",
        "log_level",
        "log_requests",
        "log_requests_format",
        "log_requests_level",
        "log_requests_target",
        "master_port",
        "model_loaded",  # what is loaded by now
        "model_path",  # its encoders' contents are the fact `model`
        "model_paths",  # where other components were found
        "nccl_port",
        "numa_node",
        "otlp_service_name",
        "otlp_traces_endpoint",
        "output_path",
        "pool_result_endpoint",
        "pool_work_endpoint",
        "port",
        "prompt_file_path",
        "revision",  # in `model` too, by contents
        "scheduler_port",
        "scheduler_ports",
        "scheduler_rpc_timeout",
        "served_model_name",
        "sleep_on_idle",
        "strict_ports",
        "uvicorn_access_log_exclude_prefixes",
        "warmup_mode",
        "warmup_num_frames",
        "warmup_resolutions",
        "warmup_sampling_params",
        "warmup_steps",
        "webui",
        "webui_port",
    }
)
# Components by name; each is a file or folder, whose contents count, or a repository, of which nothing here is known.
COMPONENTS: Final = ("component_paths", "component_weights_paths")


def prompt_namespace(pipeline: Any, encoders: Iterable[str], identity: str) -> Namespace:
    """Name the prompt embeddings of a pipeline whose model is loaded. `identity`: the setting `model_identity`.

    Reads every byte of its text encoders, the components named `encoders`, unless it is set. Raises ConfigError if it
    cannot tell what decides them, ChangedFiles if files may not be those that were loaded, KeyInputError if one it has
    to read cannot be.
    """
    arguments = pipeline.server_args
    contents = Contents(process_start_s())
    if arguments.srt_encoder_url:
        raise ConfigError("--srt-encoder-url has another server encode prompts, of which nothing is known here")
    if not identity:
        for name in COMPONENTS:
            for component, path in (getattr(arguments, name) or {}).items():
                if not os.path.exists(path):
                    raise ConfigError(f"cannot tell which weights {path!r} stands for ({name}.{component}); {REMEDY}")
    values = {field.name: getattr(arguments, field.name) for field in fields(arguments) if field.name not in OUT}
    settings = facts.engine_settings(
        {name: ("diffusion", _named(held, name)) for name, held in values.items()}, None, contents
    )
    config = arguments.pipeline_config
    return Namespace(
        kind="prompt",
        engine="sglang-diffusion",
        engine_version=sglang.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        model=identity or {name: contents.digest(_folder(pipeline, name)) for name in encoders},
        dtype=" ".join(map(str, config.text_encoder_precisions)),
        pipeline=type(config).__name__,
        device=_device(),
        settings=settings,
    )


def _folder(pipeline: Any, name: str) -> str:
    """Where a component was loaded from. Source: ComposedPipelineBase.load_modules of SGLang 0.5.23."""
    given: str | None = pipeline.server_args.component_paths.get(name)
    return given or os.path.join(pipeline.model_path, pipeline._extra_config_module_map.get(name, name))


def _device() -> str:
    """What computes: numbers differ in their last bits between these."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _named(value: Any, path: str) -> Any:
    """The same value with functions by name and objects with fields as mappings."""
    if isinstance(value, types.FunctionType):
        if not value.__module__.startswith("sglang.") or value.__closure__:
            raise ConfigError(f"{path} is the function {value.__qualname__}, whose code is not SGLang's own")
        return f"{value.__module__}.{value.__qualname__}:{value.__code__.co_firstlineno}"
    if isinstance(value, Mapping):
        return {str(name): _named(held, f"{path}.{name}") for name, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(held, path) for held in value]
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: _named(getattr(value, field.name), f"{path}.{field.name}") for field in fields(value)}
        return held | {"": f"{type(value).__module__}.{type(value).__qualname__}"}
    return value
