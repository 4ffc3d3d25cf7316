"""One repository on the Hub: list, commit and tag its files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError


logger = logging.getLogger(__name__)

# The error of the HTTP client of `huggingface_hub`, requests or httpx, if there is no response.
NO_ANSWER: Any = HfHubHTTPError.__bases__[0]
# Status codes that pass: the Hub is busy or failed, or another commit came first (412). The client retries uploads, not commits.
_PASSING = (412, 429, 500, 502, 503, 504)
_TRIES = 5


class HubRepository:
    """A model repository, created if it does not exist.

    Args:
        repo_id (`str`): "user/repo", or "repo" for one of the user who is logged in.
        private (`bool`, *optional*): visibility of a new repository; None: the account's default.
        create (`bool`, *optional*, defaults to `True`): False: it must exist already.

    Raises:
        HfHubHTTPError: no such user, no permission to write, or no valid token.
    """

    def __init__(self, repo_id: str, *, private: bool | None = None, create: bool = True) -> None:
        self._api = HfApi()
        if create:
            repo_id = self._api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        self.repo_id = repo_id

    def files(self, revision: str | None = None) -> set[str]:
        """Names of all files in a revision; None: on the main branch."""
        return set(self._api.list_repo_files(self.repo_id, revision=revision))

    def commit(
        self, make: Callable[[set[str]], Mapping[str, Path | bytes]], message: str, *, delete: Iterable[str] = ()
    ) -> CommitInfo | None:
        """Write files and delete folders in one commit. Try again if the Hub is busy or another commit came first.

        Args:
            make (callable): takes the names of the present files and returns the wanted ones: name -> file, or its contents.
                Called again for each try.
            message (`str`): message of the commit.
            delete (iterable of `str`): folders to delete; missing ones are ignored.

        Returns:
            `CommitInfo`, or None if nothing has changed: then no commit was made.

        Raises:
            HfHubHTTPError: the Hub refused, or still failed after some tries. Then nothing of the commit is visible.
        """
        tries = 0
        while True:
            head = self._api.repo_info(self.repo_id).sha
            present = self.files()
            operations: list = [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in sorted(make(present).items())
            ]
            operations += [
                CommitOperationDelete(f"{folder}/", is_folder=True)
                for folder in delete
                if any(file.startswith(f"{folder}/") for file in present)
            ]
            try:
                done = self._api.create_commit(self.repo_id, operations, commit_message=message, parent_commit=head)
                return None if done.oid == head else done
            except HfHubHTTPError as error:
                status, tries = error.response.status_code, tries + 1
                if status not in _PASSING or tries == _TRIES:
                    raise
                asked = error.response.headers.get("Retry-After", "")
                seconds = 0.0 if status == 412 else float(asked) if asked.isdigit() else float(2 ** (tries - 1))
                logger.warning("The Hub answered %s to a commit to %s; retry in %s s.", status, self.repo_id, seconds)
                time.sleep(seconds)

    def tag(self, *names: str) -> None:
        """Tag the newest commit with each of these names that does not exist yet."""
        for name in sorted(set(names) - set(self.tags())):
            self._api.create_tag(self.repo_id, tag=name, exist_ok=True)

    def tags(self) -> list[str]:
        """Names of all tags."""
        return [tag.name for tag in self._api.list_repo_refs(self.repo_id).tags]

    def forget_history(self, *, keep_tags: Callable[[str], bool]) -> None:
        """Replace the history with a single commit. Tags that `keep_tags` accepts then point to it; the others are deleted."""
        tags = self.tags()
        for tag in tags:
            self._api.delete_tag(self.repo_id, tag=tag)
        self._api.super_squash_history(self.repo_id)
        for tag in filter(keep_tags, tags):
            self._api.create_tag(self.repo_id, tag=tag)
