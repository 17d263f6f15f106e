"""The lake: one object store behind two libraries, obstore for objects and deltalake for tables.

Paths are relative to the lake's root and begin with the team, so a receipt stays true when the lake moves.
Objects are written once: ``create`` is create-if-absent on every backend.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forja.errors import BadInput, Damaged, Unavailable

if TYPE_CHECKING:
    from deltalake import DeltaTable

S3_OPTIONS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ALLOW_HTTP",
)
"""Environment variables that an S3 lake reads; they come from an Airflow connection or a Secret."""


class Lake:
    """An object store.

    Args:
        url: a folder, ``file:///path`` or ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        from obstore.store import LocalStore, S3Store

        self.options: dict[str, str] = {}
        if url.startswith("s3://"):
            self.options = {k: v for k in S3_OPTIONS if (v := os.environ.get(k))}
            self.root = url.rstrip("/")
            bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
            config: Any = {k.lower(): v for k, v in self.options.items()}
            self._store: Any = S3Store(bucket, prefix=prefix or None, config=config)
        elif "://" not in url or url.startswith("file://"):
            folder = Path(url.removeprefix("file://")).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            self.root = str(folder)
            self._store = LocalStore(folder)
        else:
            raise BadInput("FORJA_LAKE", value=url, allowed="a folder, file:///path or s3://bucket/prefix")

    def create(self, path: str, data: bytes) -> bool:
        """Write an object unless it is there; True if this call wrote it."""
        from obstore.exceptions import AlreadyExistsError

        with self._errors(path):
            try:
                self._store.put(path, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Write an object whether it is there or not: for heartbeats, which one writer owns, and for damaged content."""
        with self._errors(path):
            self._store.put(path, data)

    def get(self, path: str) -> bytes:
        """Bytes of an object; Damaged when it isn't there."""
        with self._errors(path):
            try:
                return bytes(self._store.get(path).bytes())
            except FileNotFoundError:
                raise Damaged(f"object in the lake {self.root}", value=path, do="check FORJA_LAKE and the path") from None

    def read(self, path: str, digest: str) -> bytes:
        """Bytes of an object whose SHA-256 must be ``digest``; Damaged otherwise."""
        data = self.get(path)
        if sha256(data) != digest:
            raise Damaged(f"object {path}: SHA-256 is not the one in its receipt", value=sha256(data), allowed=digest)
        return data

    def holds(self, path: str, digest: str) -> bool:
        """Whether the object is there with this content."""
        try:
            return sha256(self.get(path)) == digest
        except Damaged:
            return False

    def size(self, path: str) -> int | None:
        """Bytes of an object, None when it isn't there."""
        with self._errors(path):
            try:
                return int(self._store.head(path)["size"])
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> Iterator[str]:
        """Paths below ``prefix``, sorted."""
        with self._errors(prefix):
            found = sorted(str(entry["path"]) for page in self._store.list(prefix) for entry in page)
        yield from found

    def delete(self, path: str) -> None:
        """Remove an object; no error when it is gone already."""
        with self._errors(path), contextlib.suppress(FileNotFoundError):
            self._store.delete(path)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn the store's errors into Forja's."""
        from obstore import exceptions

        try:
            yield
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            do = f"check the credentials: {', '.join(S3_OPTIONS)}"
            raise BadInput(f"the lake {self.root} refuses {path}", value=str(error)[:300], do=do) from error
        except (exceptions.InvalidPathError, ValueError) as error:
            raise BadInput("path in the lake", value=path, allowed="names with / between them, no . or ..") from error
        except (exceptions.BaseError, OSError) as error:
            raise Unavailable(f"the lake {self.root} doesn't answer", value=str(error)[:300], do="check FORJA_LAKE; try again") from error

    def uri(self, path: str) -> str:
        """Address of a path for other tools."""
        return f"{self.root}/{path}"

    def table(self, path: str, version: int | None = None) -> DeltaTable:
        """The Delta table at ``path``, at ``version``, or at its newest version when None.

        Raises:
            BadInput: no such table or version.
        """
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        try:
            return DeltaTable(self.uri(path), version=version, storage_options=self.options or None)
        except TableNotFoundError:
            raise BadInput("table in the lake", value=path, do="ingest the recipe's events first") from None
        except DeltaError as error:
            raise BadInput(f"version of table {path}", value=version, allowed=f"a version that exists ({error})") from error
        except OSError as error:
            raise Unavailable(f"the lake {self.root} doesn't answer", value=str(error)[:300], do="check FORJA_LAKE; try again") from error


def sha256(data: bytes) -> str:
    """SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def split_table_ref(ref: str) -> tuple[str, int]:
    """Path and version of ``team/recipe/raw@12``; BadInput for anything else."""
    match = re.fullmatch(r"(.+)@(\d+)", ref)
    if not match:
        raise BadInput("table reference", value=ref, allowed="PATH@VERSION, for example vision/digits/raw@3")
    return match[1], int(match[2])


def table_digest(lake: Lake, ref: str) -> str:
    """SHA-256 over what transform reads of a table version, whatever the order of rows.

    That is the content of each row (key, label, payload digest, error) and, for a row without error, its rank among its
    key's by (time, partition, offset, topic id), since the newest one counts. The numbers themselves say nothing.
    """
    from deltalake import QueryBuilder

    path, version = split_table_ref(ref)
    query = QueryBuilder().register("raw", lake.table(path, version))
    # Delta's own engine: pyarrow's reader would import pandas, half a second in every task.
    found = query.execute(
        """select "key", "label", "sha256", "error", case when "error" is null then cast(row_number() over (
        partition by "key", "error" is null order by "time", "partition", "offset", "topic_id") as bigint) else 0 end from raw"""
    ).read_all()
    rows = sorted(zip(*(found.column(i).to_pylist() for i in range(5)), strict=True), key=str)
    return sha256(canonical(rows))
