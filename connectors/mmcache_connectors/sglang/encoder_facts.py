"""What an encoder process says of itself: everything but the item that decides an embedding. Imports SGLang."""

from __future__ import annotations

from typing import Any, Final

import sglang
from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.runtime_context import get_server_args

from mmcache_connectors.sglang import facts
from mmcache_connectors.sglang.weights import Contents, model_identity, process_start_s

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
    arguments = get_server_args()
    values = {
        name: ("processing" if name in PROCESSING else group, resolution_result(arguments, name))
        for name, group in namespace_of(type(arguments)).items()
    }
    plain = {name: held for name, (_, held) in values.items()}
    return {
        "engine": "sglang",
        "engine_version": sglang.__version__,
        "model": model_identity(plain, identity, contents),
        "settings": facts.engine_settings(values, plain["random_seed"], contents),
    }
