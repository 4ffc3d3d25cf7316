"""Model repositories in memory, as the Hub keeps them: commits, branches, tags, LFS objects. Knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field


_LFS_EXTENSIONS = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar "
    "safetensors tar tflite tgz wasm xz zip zst"
)
GIT_ATTRIBUTES = "".join(f"*.{name} filter=lfs diff=lfs merge=lfs -text\n" for name in _LFS_EXTENSIONS.split())


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit, in git or as an LFS object."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def blob_id(self) -> str:
        """Git's own hash of the file, of the pointer where the content is an LFS object."""
        data = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A commit with every file of its tree."""

    oid: str
    message: str
    files: Mapping[str, StoredFile]
    parent: str | None


@dataclass
class Repository:
    """A repository with its history; new ones have the `.gitattributes` that the Hub commits first."""

    repo_id: str
    history: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)
    _count: itertools.count = field(default_factory=itertools.count, repr=False)

    def __post_init__(self):
        self.add_commit("main", {".gitattributes": StoredFile(GIT_ATTRIBUTES.encode(), lfs=False)}, "initial commit")

    def add_commit(self, branch: str, files: Mapping[str, StoredFile], message: str, *, root: bool = False) -> Commit:
        """Makes `files` the whole tree of `branch`; with `root` the new commit has no parent."""
        parent = None if root else self.branches.get(branch)
        described = [self.repo_id, next(self._count), parent, message]
        described += [(path, stored.blob_id) for path, stored in sorted(files.items())]
        oid = hashlib.sha1(repr(described).encode()).hexdigest()
        commit = Commit(oid, message, dict(files), parent)
        self.history[oid] = commit
        self.branches[branch] = oid
        self.lfs_objects.update({stored.sha256: stored.content for stored in files.values() if stored.lfs})
        return commit

    def squash(self, branch: str, message: str) -> Commit:
        """Leaves one commit on `branch`, and of the others those that a branch or tag still reaches."""
        commit = self.add_commit(branch, self.history[self.branches[branch]].files, message, root=True)
        reached = {done.oid for ref in (*self.branches, *self.tags) for done in self.log(ref)}
        self.history = {oid: kept for oid, kept in self.history.items() if oid in reached}
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or a hash of seven digits or more."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        oid = self.branches.get(name) or self.tags.get(name) or name
        if oid in self.history:
            return self.history[oid]
        matching = [commit for known, commit in self.history.items() if len(oid) >= 7 and known.startswith(oid)]
        return matching[0] if len(matching) == 1 else None

    def log(self, revision: str) -> list[Commit]:
        """The commits that lead to `revision`, newest first."""
        commits = []
        commit = self.find(revision)
        while commit is not None:
            commits.append(commit)
            commit = self.history.get(commit.parent) if commit.parent else None
        return commits
