"""`lorakit serve`: serve a base and many adapters over OpenAI's HTTP API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorakit import allocator
from lorakit.choices import DTYPES
from lorakit.cli import console, early
from lorakit.cli.flag_groups import DeviceFlag, DtypeFlag, RevisionFlag
from lorakit.errors import UsageError, require_packages
from lorakit.plan.quantized import stored_as
from lorakit.train.settings.defaults import DEFAULTS

MOST_SECONDS = 86_400
"""Largest --request-timeout."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of `lorakit serve`."""

    model: Annotated[str, Parameter(help="Base: model directory, GGUF file, Hub id, or smollm2.")]
    revision: RevisionFlag = None
    host: Annotated[str, Parameter(help="Address to listen on; one that others can reach needs --api-keys.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Parameter(help="Port to listen on; 0 selects a free one.")] = 8000
    api_keys: Annotated[
        Path | None, Parameter(help="JSON file with names, hashes and permissions of API keys; see docs/serving.md.")
    ] = None
    request_timeout: Annotated[float, Parameter(help="Longest time for a reply in seconds.")] = 600.0
    rows: Annotated[int, Parameter(help="Maximum number of answers that are generated at the same time.")] = 32
    waiting: Annotated[int, Parameter(help="Maximum number of answers that wait; others get HTTP status 429.")] = 256
    dtype: DtypeFlag = "auto"
    device: DeviceFlag = "auto"
    quantization: Annotated[str | None, Parameter(help=DEFAULTS["quantization"].help())] = None


def run(
    *adapters: Annotated[
        Path, Parameter(help="Registries, whose new versions are served without a restart, and directories of runs.")
    ],
    flags: Annotated[Flags, Parameter(name="*")],
) -> int:
    """Serve a base and many adapters over OpenAI's HTTP API.

    Requests name an adapter as their model: NAME or NAME@HASH12. The log has one JSON object per line, on standard
    error, without prompts and answers. SIGTERM ends the server after the running requests.

    Raises:
        UsageError: The address needs API keys, or a directory has no adapters.
        LorakitError: The base or an adapter cannot be served.
    """
    base = _check(flags)
    require_packages("lorakit serve", "serve", ("fastapi", "uvicorn", "prometheus_client"))
    allocator.set_up()  # before torch allocates any memory
    from lorakit.serve.app import Access
    from lorakit.serve.keys import read_keys
    from lorakit.serve.server import Address, Server, run_server
    from lorakit.serve.service import Limits, Service
    from lorakit.serve.sources import Sources
    from lorakit.session.opening import open_session
    from lorakit.tasks import CAUSAL_LM

    keys = [] if flags.api_keys is None else read_keys(flags.api_keys)
    address = Address(flags.host, flags.port)
    address.check(has_keys=bool(keys))
    with address.bind() as listener:
        sources = Sources(adapters)
        quantization = stored_as(flags.quantization, True)
        session = open_session(
            base, task=CAUSAL_LM.name, dtype=flags.dtype, device=flags.device, quantization=quantization
        )
        console.remarks(session.remarks)
        name = Path(flags.model).name if Path(flags.model).exists() else flags.model
        service = Service(session, sources, name, Limits(rows=flags.rows, waiting=flags.waiting))
        service.start()
        return run_server(Server(service, Access(keys, flags.request_timeout), address, listener), service)


def _check(flags: Flags) -> str:
    """Check the flags, and return the name of the base with its revision."""
    early.check_choice("dtype", flags.dtype, DTYPES)
    early.check_device(flags.device)
    early.check_at_least("rows", flags.rows, 1)
    early.check_at_least("waiting", flags.waiting, 0)
    if not 0 <= flags.port < 1 << 16:
        raise UsageError.of("port", flags.port, "from 0 to 65535")
    if not 0 < flags.request_timeout <= MOST_SECONDS:
        text = f"--request-timeout must be above 0 and at most {MOST_SECONDS:,} seconds."
        raise UsageError(text, what=flags.request_timeout, field="request_timeout")
    return early.check_model(flags.model, flags.revision)
