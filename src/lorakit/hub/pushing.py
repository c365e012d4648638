"""Putting a folder onto a model hub, only when a person asks for it."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import ModelError


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    as_pull_request: bool = False,
) -> str:
    """Upload a folder's files; the repository is made where it is missing.

    Args:
        folder: What to upload.
        repository: Its id, "owner/name".
        message: Of the commit.
        private: A new repository is not public.
        token: Of the hub; None takes the stored one.
        revision: Branch to commit to.
        as_pull_request: Ask for a review instead.

    Returns:
        Where the commit can be seen.

    Raises:
        ModelError: The hub refuses, or cannot be reached.
    """
    import huggingface_hub

    client = huggingface_hub.HfApi(token=token)
    try:
        place = client.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = client.upload_folder(
            repo_id=place, folder_path=folder, commit_message=message, revision=revision, create_pr=as_pull_request
        )
    except Exception as cause:  # the hub's client changes its transport, and with it what it raises
        raise ModelError(
            f"{repository!r} could not be written on the hub ({type(cause).__name__}: {cause}). Check the name, the "
            "token and the network."
        ) from cause
    return str(commit)
