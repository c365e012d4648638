"""`push_to_hub` of a wrapper: its adapters as they are saved, with their card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn


class Pushed(nn.Module):
    """A wrapper that can be put onto a model hub."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """Save the adapters and upload them.

        Args:
            repo_id: The repository, "owner/name"; it is made where it is missing.
            commit_message: Of the commit.
            private: A new repository is not public.
            token: Of the hub; None takes the stored one.
            revision: Branch to commit to.
            create_pr: Ask for a review instead.
            kwargs: What `save_pretrained` takes.

        Returns:
            Where the commit can be seen.

        Raises:
            ModelError: The hub refuses, or cannot be reached.
        """
        from lorakit.hub.pushing import push_folder

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)  # type: ignore[operator]
            return push_folder(
                Path(folder),
                repo_id,
                message=commit_message or "Upload adapter",
                private=private,
                token=token,
                revision=revision,
                as_pull_request=create_pr,
            )
