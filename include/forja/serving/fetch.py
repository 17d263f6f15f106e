"""Brings a release from the lake to Triton: ``python -m forja.serving.fetch PATH SHA256 FOLDER`` in the control image.

PATH is the release.json that a release stage left in the lake, SHA256 its digest. What it names comes into FOLDER/<model>, each
file checked: nothing is served that isn't, to the byte, what was proven.
"""

from __future__ import annotations

import sys
from pathlib import Path

from forja.errors import BadInput, Damaged, ForjaError
from forja.lake import Lake
from forja.serving import repository
from forja.serving.repository import Release
from forja.settings import Settings


def fetch(lake: Lake, path: str, digest: str, folder: Path) -> Release:
    """Put the release of ``path`` into ``folder``, a model repository.

    Raises:
        Damaged: an object is missing, or not what its digest says.
        Unavailable: the lake doesn't answer.
    """
    body = lake.read(path, digest)
    release = repository.parse(body, path, "the lake")
    if set(release.objects) != set(release.digests):
        raise Damaged(f"release {path}: files in the lake", value=sorted(release.objects), allowed=", ".join(sorted(release.digests)))
    contents = {name: lake.read(release.objects[name], wanted) for name, wanted in release.digests.items()}
    repository.unpack(folder / release.model, {**contents, "release.json": body})
    return release


def main(arguments: list[str]) -> int:
    """Command line; the exit status is that of the error (see ``forja.errors``)."""
    try:
        if len(arguments) != 3:
            raise BadInput("arguments", value=" ".join(arguments), allowed="PATH SHA256 FOLDER")
        path, digest, folder = arguments
        release = fetch(Lake(Settings.from_env().lake), path, digest, Path(folder))
    except ForjaError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{release.model} version {release.version} ({release.variant}): {len(release.digests)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
