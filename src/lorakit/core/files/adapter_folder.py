"""Read, verify and write an adapter's directory: PEFT's files, and `lorakit.json`, which lorakit adds.

`lorakit.json` contains the base's fingerprint, SHA-256 hashes of the weights and the config, the rank and alpha of each
site, training metadata, and a seal, which is a checksum of everything else. An adapter that lacks this file, or that
another program has rewritten, still loads but cannot be verified. While files are being replaced one by one,
`lorakit.json` also describes the old files, so that a mixture of old and new files is rejected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorakit import durable, durable_folders
from lorakit.config import CONFIG_FILE, HEADS_BY_TASK, SIDECAR_FILE, LoraConfig, adapter_directory, read_config
from lorakit.core.files.tensors import TensorFile, read_tensors
from lorakit.core.model.fingerprint import Fingerprint
from lorakit.core.model.index import INSIDE, without_wrappers
from lorakit.durable import SEAL, JsonObject, JsonValue, as_object
from lorakit.errors import AdapterFileError, PatternError
from lorakit.targets.patterns import literal_value, names_path
from lorakit.tensor_headers import file_error

WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 2
SEALED_SINCE = 2
"""The first format version in which a seal and the SHA-256 of the weights and the config are mandatory."""

METADATA_KEY = "lorakit"
"""Key in the header of the weights file; it is missing if another program has rewritten the file."""

KINDS_KEY = "kinds"
"""Key for the names of the custom site kinds that the adapter uses."""

INITIAL_FILE = "lorakit_initial.safetensors"
"""File with the initial factors of an adapter that has a residual base and was saved as trained."""

MAX_BYTES = 16 << 20

REPLACES = "replaces"
"""Key for the old `lorakit.json` and the SHA-256 of each old file while files are being replaced one by one."""

BEGAN = "began"
"""Key for the initial state of an adapter with a residual base: config fields, and each site's rank and alpha."""

ATTEMPTS = 3
"""Maximum number of attempts to read an adapter while another process replaces it."""


@dataclass(frozen=True)
class Sidecar:
    """Contents of `lorakit.json`; the fields keep their defaults if there is no such file.

    Attributes:
        weights_sha256: SHA-256 of the weights file and, in format 1, also of the weights file that it replaced.
        config_sha256: SHA-256 of the config file.
        sites: Dict from site path to the site's rank and alpha, with the keys "r" and "lora_alpha".
        facts: All other values, such as training metadata.
        began: The initial state of an adapter whose init modified the base; empty for other adapters.
        format_version: Format version of the file; 0 if there is no file.
        interrupted: Whether a save was interrupted; if so, the files are those from before that save.
    """

    present: bool = False
    weights_sha256: tuple[str, ...] = ()
    config_sha256: str = ""
    base: Fingerprint | None = None
    sites: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: JsonObject = field(default_factory=dict)
    began: JsonObject = field(default_factory=dict)
    format_version: int = 0
    interrupted: bool = False


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter's directory.

    Attributes:
        config_is_ours: Whether the config file is byte for byte the one written with the weights.
        warnings: Messages for the user.
        made: Whether the adapter was built in memory rather than read from disk; if so, an all-zero update is accepted.
    """

    folder: Path
    config: LoraConfig
    file: TensorFile
    sidecar: Sidecar
    config_is_ours: bool
    warnings: tuple[str, ...]
    made: bool = False

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary of the base that the adapter was made for, in rows; 0 if unknown."""
        return 0 if self.sidecar.base is None else self.sidecar.base.vocabulary

    @property
    def head_outputs(self) -> int | None:
        """Number of outputs of the task's head that is saved with the adapter, or None if there is none."""
        heads = HEADS_BY_TASK.get(self.config.task_type, ())
        sizes = [
            tensor.shape[0]
            for name, tensor in self.file.tensors.items()
            if tensor.ndim == 2 and name.endswith(".weight") and any(f".{head}." in name for head in heads)
        ]
        return min(sizes, default=None)

    @property
    def is_ours(self) -> bool:
        """True if the config and weights files are byte for byte those that `lorakit.json` describes."""
        return self.config_is_ours and self.file.sha256 in self.sidecar.weights_sha256


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFiles:
    """Read and verify the files of an adapter, in its directory or a run directory; no model is needed.

    Raises:
        AdapterFileError: A file is missing, damaged, or in a format that is never loaded, such as pickle.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    folder = adapter_directory(folder)
    if folder.is_file():
        raise file_error(folder, f"this is a file, but an adapter is a directory that contains {CONFIG_FILE}.")
    for _ in range(ATTEMPTS):
        before = _identities(folder)
        try:
            files = _read_once(folder)
        except (AdapterFileError, OSError):
            if _identities(folder) == before:
                raise
        else:
            if _identities(folder) == before:
                return files
    raise file_error(folder, "the files changed while they were being read; retry when no process writes to them.")


def _read_once(folder: Path) -> AdapterFiles:
    """Try once to read and verify the files, which another process may be replacing at the same time."""
    config, unknown = read_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        problem = f"the weights are a pickle (adapter_model.bin), which is never loaded; convert it to {WEIGHTS_FILE}."
        raise file_error(folder, problem)
    file = _unwrapped(read_tensors(weights))
    values, interrupted = _valid_values(folder)
    sidecar = Sidecar(interrupted=interrupted)
    if values is not None:
        sidecar = _parsed(folder / SIDECAR_FILE, values, interrupted)
    warnings = []
    if unknown:
        warnings.append(f"{folder}: unknown fields in {CONFIG_FILE} were ignored: {', '.join(unknown)}.")
    doubt = _doubt(sidecar, file, weights)
    if doubt and sidecar.present:
        warnings.append(f"{folder}: {doubt}.")
    if sidecar.interrupted:
        warnings.append(f"{folder}: a save was interrupted; this is the adapter from before that save.")
    ours = sidecar.present and sidecar.config_sha256 == durable.sha256_file(folder / CONFIG_FILE)
    if sidecar.present and not ours:
        warnings.append(f"{folder}: {CONFIG_FILE} was edited after the adapter was saved; the edited config is used.")
    return AdapterFiles(folder, config, file, sidecar, ours, tuple(warnings))


def _unwrapped(file: TensorFile) -> TensorFile:
    """Return a file with the names of tensors in the plain base; peft keeps the names of wrappers (torch.compile)."""
    tensors = {without_wrappers(name): tensor for name, tensor in file.tensors.items()}
    return dataclasses.replace(file, tensors=tensors) if len(tensors) == len(file.tensors) else file


def alpha_at(files: AdapterFiles, path: str, pattern_path: str | None = None) -> float:
    """Return a site's alpha: from `lorakit.json` if that file describes this config, otherwise from the config.

    The config's pattern is matched with `pattern_path`, by default the path on disk, and raises an AdapterFileError if
    it is a regular expression.
    """
    if files.config_is_ours and path in files.sidecar.sites:
        return float(files.sidecar.sites[path]["lora_alpha"])
    try:
        return literal_value(files.config.alpha_pattern, pattern_path or path, files.config.lora_alpha)
    except PatternError as cause:
        where = files.folder / CONFIG_FILE
        fields = {**cause.fields, "where": where, "field": "alpha_pattern"}
        raise AdapterFileError(f"{where}: alpha_pattern: {cause}", **fields) from None


def parameters_meant(config: LoraConfig, path: str) -> tuple[str, ...]:
    """Return the targeted parameters that a site on disk may refer to, sorted; empty if the module itself is a target.

    Only the model shows which of them a tensor belongs to: the order in which the module defines them decides.
    """
    module, targets = path.partition(INSIDE)[0], config.target_modules
    if not isinstance(targets, str) and any(names_path(entry, module) for entry in targets or ()):
        return ()
    parts = [entry.rpartition(".") for entry in config.target_parameters or ()]
    parameters = {f"{module}.{name}" for holder, _, name in parts if not holder or names_path(holder, module)}
    return tuple(sorted(parameters))


def rank_and_alpha(files: AdapterFiles, path: str, rows: int) -> tuple[int, float | None]:
    """Return a site's rank and alpha, or `rows` and None if they are unknown, for A with `rows` rows.

    In an adapter that PEFT wrote, those of a directly targeted parameter are known only if the patterns give the same
    values for all parameters that the site may refer to.
    """
    config = files.config
    known = files.sidecar.sites.get(path) if files.config_is_ours else None
    if known is not None:
        rank = int(known["r"])
        return (rank if rank > 0 and rows % rank == 0 else rows), float(known["lora_alpha"])
    meant = parameters_meant(config, path)
    try:
        ranks = {int(literal_value(config.rank_pattern, name, config.r)) for name in meant} or {rows}
        alphas = {float(literal_value(config.alpha_pattern, name, config.lora_alpha)) for name in meant or [path]}
    except PatternError:
        return rows, None
    fitting = [rank for rank in ranks if rank > 0 and rows % rank == 0]
    if len(fitting) != 1 or len(alphas) != 1:
        return rows, None
    return fitting[0], alphas.pop()


@dataclass(frozen=True)
class SavedAdapter:
    """Result of saving an adapter.

    Attributes:
        weights_sha256: SHA-256 of the weights file, which identifies the adapter regardless of its name.
    """

    folder: Path
    files: tuple[str, ...]
    weights_bytes: int
    weights_sha256: str


def write_files(
    folder: Path, config: bytes, weights: bytes, about: Mapping[str, JsonValue], initial: bytes | None = None
) -> SavedAdapter:
    """Write an adapter's files; a crash leaves the old adapter, the new one, or a directory that cannot be loaded.

    The directory is swapped with a complete new one, so that old and new files never mix. If that cannot be done, the
    files are replaced one by one, such that `lorakit.json` always shows which files belong together. Other files are
    kept. Without `initial`, `lorakit_initial.safetensors` is removed.
    """
    files = {CONFIG_FILE: config, WEIGHTS_FILE: weights, **({} if initial is None else {INITIAL_FILE: initial})}
    last = {SIDECAR_FILE: sidecar_bytes(about, config, weights), **({INITIAL_FILE: None} if initial is None else {})}
    if not durable_folders.replace_files(folder, {**files, **last}):
        first = {SIDECAR_FILE: sidecar_bytes(about, config, weights, replaced_files(folder))}
        durable_folders.replace_in_order(folder, [first, files, last])
    names = (CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE, *(() if initial is None else (INITIAL_FILE,)))
    return SavedAdapter(folder, names, len(weights), durable.sha256_bytes(weights))


def sidecar_bytes(
    about: Mapping[str, JsonValue], config: bytes, weights: bytes, replaces: JsonObject | None = None
) -> bytes:
    """Return the content of `lorakit.json`, with the result of `replaced_files` if files are replaced one by one."""
    values: JsonObject = {
        **about,
        "format_version": FORMAT_VERSION,
        "weights": {"file": WEIGHTS_FILE, "sha256": durable.sha256_bytes(weights), "bytes": len(weights)},
        "config": {"file": CONFIG_FILE, "sha256": durable.sha256_bytes(config)},
    }
    values.pop(REPLACES, None)
    return durable.json_bytes(durable.sealed(values if replaces is None else {**values, REPLACES: replaces}))


def replaced_files(folder: Path) -> JsonObject:
    """Return a record of the files to be replaced: the SHA-256 of each (none if incomplete), and `lorakit.json`."""
    try:
        values, _ = _valid_values(folder)
        before = {name: durable.sha256_file(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    except (AdapterFileError, OSError):
        return {"files": {}, "sidecar": None}
    return {"files": {**before, **_first_factors(values or {})}, "sidecar": values}


def _identities(folder: Path) -> list[tuple[int, int, int] | None]:
    """Return each adapter file's inode, modification time and size (None if missing), to detect replaced files."""
    identities: list[tuple[int, int, int] | None] = [None, None, None]
    for at, name in enumerate((CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE)):
        with contextlib.suppress(OSError):
            status = (folder / name).stat()
            identities[at] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return identities


def _valid_values(folder: Path) -> tuple[JsonObject | None, bool]:
    """Return the `lorakit.json` values for the current files, and whether those files predate an interrupted save."""
    path = folder / SIDECAR_FILE
    if not path.exists():
        return None, False
    values = _checked(path, durable.read_json(path, MAX_BYTES))
    if REPLACES not in values or values["format_version"] < SEALED_SINCE:
        return values, False
    after = {
        CONFIG_FILE: values["config"]["sha256"],
        WEIGHTS_FILE: values["weights"]["sha256"],
        **_first_factors(values),
    }
    replaces = as_object(values[REPLACES])
    before = as_object(replaces.get("files"))
    on_disk = {name: durable.sha256_file(folder / name) for name in {**after, **before} if (folder / name).is_file()}
    if all(on_disk.get(name) == sha256 for name, sha256 in after.items()):
        return {key: value for key, value in values.items() if key != REPLACES}, False
    if before and all(on_disk.get(name) == sha256 for name, sha256 in before.items()):
        old = replaces.get("sidecar")
        return (None if old is None else _checked(path, old)), True
    raise _mixed(folder, on_disk, after, before)


def _mixed(
    folder: Path, on_disk: Mapping[str, str], after: Mapping[str, str], before: Mapping[str, str]
) -> AdapterFileError:
    which = {name: "missing" if name not in on_disk else "neither old nor new" for name in after}
    which |= {name: "the old one" for name in before if on_disk.get(name) == before[name]}
    which |= {name: "the new one" for name in after if on_disk.get(name) == after[name]}
    shown = ", ".join(f"{name} is {one}" for name, one in sorted(which.items()))
    back = [name for name in before if on_disk.get(name) != before[name]]
    way = f", or restore the old {' and '.join(sorted(back))} from a copy" if back else ""
    return file_error(
        folder, f"a save was interrupted, and the files do not belong together: {shown}. Save the adapter again{way}."
    )


def _first_factors(values: JsonObject) -> dict[str, str]:
    """Return {name: SHA-256} for the file with the initial factors, or an empty dict if no such file is needed."""
    began = as_object(values.get(BEGAN))
    return {str(began["file"]): str(began.get("sha256"))} if began.get("file") else {}


def _checked(path: Path, value: JsonValue) -> JsonObject:
    """Check that a value is a JSON object in a known format, with a valid seal if the format has one."""
    values = as_object(value)
    version = values.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _not_valid(path, "not a JSON object with a format_version")
    if version > FORMAT_VERSION:
        raise _not_valid(path, f"format {version} is newer than format {FORMAT_VERSION}, the latest one that is known")
    hashes = [as_object(values.get(key)).get("sha256") for key in ("weights", "config")]
    if version >= SEALED_SINCE and not (
        durable.is_sealed(values) and all(isinstance(sha256, str) for sha256 in hashes)
    ):
        problem = "damaged or edited; restore it from a copy, or remove it to load the adapter unverified."
        raise file_error(path, problem)
    return values


def _not_valid(path: Path, problem: str) -> AdapterFileError:
    return file_error(path, f"{problem}. Remove the file to load the adapter unverified.")


def _parsed(path: Path, values: JsonObject, interrupted: bool) -> Sidecar:
    weights, config, sites, began = (as_object(values.get(key)) for key in ("weights", "config", "sites", BEGAN))
    shas = tuple(str(weights[key]) for key in ("sha256", "previous_sha256") if weights.get(key))
    known = {"format_version", SEAL, "weights", "config", "base", "sites", BEGAN}
    facts = {key: value for key, value in values.items() if key not in known}
    base = Fingerprint.from_dict(values["base"]) if values.get("base") else None
    if values.get("base") and base is None:
        raise _not_valid(path, "base is not a fingerprint")
    for site, entry in sites.items():
        if not _is_site(entry):
            raise _not_valid(path, f"sites[{site!r}] is {str(entry)[:60]}; expected numbers r and lora_alpha")
    if began and not all(map(_is_site, as_object(began.get("sites")).values())):
        raise _not_valid(path, f"{BEGAN} does not contain numbers r and lora_alpha for each site")
    version = values["format_version"]
    return Sidecar(True, shas, str(config.get("sha256", "")), base, sites, facts, began, version, interrupted)


def _doubt(sidecar: Sidecar, file: TensorFile, path: Path) -> str | None:
    """Return why the weights cannot be verified, or None if lorakit wrote them and they are unchanged."""
    written = file.metadata.get(METADATA_KEY, "")
    if sidecar.present and written.isdecimal() and int(written) > sidecar.format_version:
        problem = f"written in format {written}, but {SIDECAR_FILE} is in format {sidecar.format_version}; restore it."
        raise file_error(path, problem)
    if file.sha256 in sidecar.weights_sha256:
        return None
    if sidecar.present and METADATA_KEY in file.metadata:
        known = "".join(sidecar.weights_sha256[:1])[:12] or "none"
        raise file_error(path, f"damaged: its SHA-256 is {file.sha256[:12]}…, not {known}…; restore it from a copy.")
    if sidecar.present:
        return "the weights were rewritten by another program, so they cannot be verified"
    return f"there is no {SIDECAR_FILE}, so the weights cannot be verified"


def _is_site(entry: JsonValue) -> bool:
    numbers = [as_object(entry).get(key) for key in ("r", "lora_alpha")]
    return all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
