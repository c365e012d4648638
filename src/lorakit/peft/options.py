"""Options of PEFT's calls beyond those that every program uses: which have no effect here, and which are not built yet.

An option that only says how PEFT shall save memory or where it shall put things is accepted in silence; one that would
change a result is refused by name; one that nobody knows is warned about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.errors import NotYetSupported, nearest, warn_caller

WITHOUT_EFFECT: Mapping[str, str] = {
    "low_cpu_mem_usage": "factors are made once, where their site is",
    "ephemeral_gpu_offload": "nothing is moved to compute an init",
    "torch_device": "factors go to their site's device",
    "device_map": "factors go to their site's device",
    "max_memory": "factors go to their site's device",
    "offload_folder": "factors go to their site's device",
    "offload_dir": "factors go to their site's device",
    "torch_dtype": "factors are fp32 or wider beside any base",
    "dtype": "factors are fp32 or wider beside any base",
    "token": "the hub's client reads HF_TOKEN",
    "use_auth_token": "the hub's client reads HF_TOKEN",
    "cache_dir": "the hub's client reads HF_HOME",
    "local_files_only": "the network is only used for a hub id, and HF_HUB_OFFLINE keeps it off",
    "force_download": "the hub's client knows what is new",
    "proxies": "the hub's client reads HTTPS_PROXY",
}
"""Option -> why nothing has to be done for it."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
}
"""Option that is not built yet -> the values that ask for nothing that is not done anyway."""


def check_options(call: str, options: Mapping[str, Any]) -> None:
    """Look at the options that a call does not use.

    Args:
        call: Name of the call, for messages.
        options: What was given beyond its own arguments.

    Raises:
        NotYetSupported: One of them would change the result and is not built.
    """
    for name, value in options.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise NotYetSupported(
                    f"{call}: {name}={value!r} is not built yet. Leave it at {NEUTRAL[name][0]!r}, its default."
                )
        elif name not in WITHOUT_EFFECT:
            hint = nearest(name, [*WITHOUT_EFFECT, *NEUTRAL], 1)
            meant = f" Did you mean {hint[0]}?" if hint else ""
            warn_caller(f"{call}: {name} is not known here and has no effect.{meant}")
