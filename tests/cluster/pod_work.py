"""Work for stage pods whose stage is stand_in.py: each piece is a version of the raw table, and says in the lake what its stage does."""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from pathlib import Path

from cluster.platform import Platform

from forja.stages import ingest

TABLE = ingest.table_path("vision", "digits")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece of work, with a key of its own."""

    platform: Platform
    version: int

    @property
    def conf(self) -> dict[str, str]:
        """What a run of a DAG of dags/pods.py is started with."""
        return {"raw": f"{TABLE}@{self.version}"}

    @property
    def starts(self) -> int:
        """How often the stage began to work, in whichever pod."""
        return len(list(self.platform.lake.list(f"tests/{self.version}/starts")))

    def go(self) -> None:
        """Let a stage that waits end."""
        self.platform.lake.create(f"tests/{self.version}/go", b"")

    def wait_started(self, times: int = 1, seconds: float = 90) -> None:
        """Wait until the stage works."""
        self.platform.until(f"start {times} of version {self.version}", lambda: self.starts >= times, seconds)


def new(platform: Platform, does: str = "") -> Work:
    """Work that nobody did: a new version of the raw table."""
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    table, options, name = platform.lake.uri(TABLE), platform.lake.options, uuid.uuid4().hex
    rows = [{"key": f"{name}-{n}", "label": "1", "sha256": f"{name}-{n}", "offset": n, "time": n} for n in range(3)]
    write_deltalake(table, pa.Table.from_pylist(rows, schema=pa.schema(ingest.schema())), mode="append", storage_options=options)
    made = Work(platform=platform, version=DeltaTable(table, storage_options=options).version())
    platform.lake.create(f"tests/{made.version}/does", does.encode())
    return made


def command_lines() -> list[Path]:
    """The file with the command line of each process of this machine that still has one; pods' are among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes():
                found.append(path)
    return found
