"""One repository on the Hub: its files, and commits of some of them, whole or not at all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError


logger = logging.getLogger(__name__)

# What the HTTP client of `huggingface_hub`, requests or httpx, raises if no answer comes.
NO_ANSWER: Any = HfHubHTTPError.__bases__[0]
# The client repeats uploads by itself, but not the commit: the Hub is busy, failed, or someone else was faster (412).
_PASSING = (412, 429, 500, 502, 503, 504)
_TRIES = 5


class HubRepository:
    """
    A repository for models, made if it is not there.

    Args:
        repo_id (`str`): "user/repo", or "repo" for one of the user who is logged in.
        private (`bool`, *optional*): of a repository that is made now; None: as the account is set.
        create (`bool`, *optional*, defaults to `True`): False: it must be there.

    Raises:
        HfHubHTTPError: no such user, no right to write, no valid token.
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
        """
        Write files in one commit, and delete folders; repeated when the Hub is busy or someone else's commit came first.

        Args:
            make (callable): from the names of the files there now, the files wanted: name -> file, or its contents. Called again
                after someone else's commit.
            message (`str`): of the commit.
            delete (iterable of `str`): folders to delete; those that are not there are ignored.

        Returns:
            `CommitInfo`, or None if all of it was there already: then no commit was made.

        Raises:
            HfHubHTTPError: the Hub refused, or still failed after some tries. Nothing of the commit is visible then.
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
                logger.warning("The Hub answered %s to a commit to %s: again in %s s.", status, self.repo_id, seconds)
                time.sleep(seconds)

    def tag(self, *names: str) -> None:
        """Tag the newest commit by each of these names that no tag has yet."""
        for name in sorted(set(names) - set(self.tags())):
            self._api.create_tag(self.repo_id, tag=name, exist_ok=True)

    def tags(self) -> list[str]:
        """Names of all tags."""
        return [tag.name for tag in self._api.list_repo_refs(self.repo_id).tags]

    def forget_history(self, *, keep_tags: Callable[[str], bool]) -> None:
        """Make the newest commit the only one; tags that `keep_tags` takes point to it afterwards, others are deleted."""
        tags = self.tags()
        for tag in tags:
            self._api.delete_tag(self.repo_id, tag=tag)
        self._api.super_squash_history(self.repo_id)
        for tag in filter(keep_tags, tags):
            self._api.create_tag(self.repo_id, tag=tag)
