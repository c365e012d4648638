"""PEFT-compatible API built on the core: to run code written for `peft`, change only its imports.

Its methods delegate to `lorakit.core`, and warn of mismatches that PEFT silently ignores and the core rejects. Names
are imported from their defining modules on first use; `paths.json` lists module paths such as `peft.tuners.lora`.
"""

from lorakit.config import API_LEVEL as __version__
from lorakit.peft import paths

paths.register()
__getattr__, __dir__ = paths.lazy_names()
__all__ = ["__version__", *__dir__()]
