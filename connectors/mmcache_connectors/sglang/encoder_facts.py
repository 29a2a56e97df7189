"""What an encoder process says of itself: everything but the item that decides an embedding. Imports SGLang."""

from __future__ import annotations

from typing import Any, Final

import sglang
from sglang.srt.arg_groups.arg_utils import namespace_of, record_fields
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.runtime_context import get_server_args

from mmcache_connectors.sglang import facts
from mmcache_connectors.sglang.encoder_shared import unshared
from mmcache_connectors.sglang.weights import Contents, model_identity, process_start_s
from mmcache_connectors.shared_embeddings import Tower

# Arguments that are no part of a page's name, and are of an embedding's: how media become features. For most models
# these end in the features, which name the item; some take media as they are, and process them on the way in.
PROCESSING: Final = (
    "disable_fast_image_processor",
    "image_processor_backend",
    "mm_enable_dp_encoder",
    "mm_process_config",
    "tokenizer_path",  # where the processors come from
)


def encoder_facts(identity: str) -> dict[str, Any]:
    """Facts of an embedding namespace, but for dtype and width. `identity`: the setting `model_identity`.

    Reads every byte of a local model unless it is set. Raises ConfigError if it cannot tell which weights these are,
    ChangedFiles if they may not be those that were loaded, KeyInputError if a file it has to read cannot be.
    """
    contents = Contents(process_start_s())
    values = _arguments()
    plain = {name: held for name, (_, held) in values.items()}
    return {
        "engine": "sglang",
        "engine_version": sglang.__version__,
        "model": model_identity(plain, identity, contents),
        "settings": facts.engine_settings(values, plain["random_seed"], contents),
    }


def shared_tower(model: str, dtype: str) -> tuple[Tower | None, str | None]:
    """This encoder's tower by what other kinds of engines can say of theirs too, or why they share nothing with it."""
    arguments = get_server_args()
    config = ModelConfig.from_server_args(arguments)
    architecture = (config.hf_config.architectures or ("a model without architecture",))[0]
    quantized = config.quantization or getattr(config.hf_config, "quantization_config", None)
    own = {field.name: _default(field) for field in record_fields(type(arguments))}
    reason = unshared(sglang.__version__, architecture, bool(quantized), _arguments(), own)
    device = str(resolution_result(arguments, "device"))
    return (None, reason) if reason else (Tower(architecture, model, dtype, device), None)


def _arguments() -> dict[str, tuple[str, Any]]:
    """SGLang's arguments: name -> (group, what is in effect)."""
    arguments = get_server_args()
    values = {
        name: ("processing" if name in PROCESSING else group, resolution_result(arguments, name))
        for name, group in namespace_of(type(arguments)).items()
    }
    if values["tokenizer_path"][1] == values["model_path"][1]:  # SGLang's default; the fact `model` says what it holds
        values["tokenizer_path"] = ("processing", None)
    return values


def _default(field: Any) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default
