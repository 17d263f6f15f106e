"""The lock's exports: one file with hashes for each environment, for pip and for the images.

``make lock`` runs this module; tests/rules/test_locks.py runs the same exports and compares.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from forja import envs
from forja.settings import ROOT, Settings

EXPORTS = {
    "requirements.txt": ("control",),
    "k8s/images/ml.txt": ("ml",),
    "k8s/images/ml-gpu.txt": ("ml", "gpu"),
    "k8s/images/serving.txt": ("serving",),
}
"""File in the repository, and the dependency groups that it holds."""

ORDERED = {
    "apache-airflow": "apache-airflow",
    "apache-airflow-providers-cncf-kubernetes": "apache-airflow-providers-cncf-kubernetes",
    "nvidia-dali-cuda120": "nvidia-dali-cuda120",
    "cudf-cu12": "cudf-cu12",
    "torch": "torch",
    "tensorrt": "tensorrt-cu12",
    "tritonclient": "tritonclient",
    "mlflow": "mlflow",
    "kafka-python": "kafka-python",
}
"""The nine packages that Forja was ordered with, and the distribution that the lock holds for each."""


def exports(settings: Settings) -> dict[str, str]:
    """Text of every export, from uv.lock alone: no network, no index hosts."""
    return _with_headers({path: _export(envs.uv(settings), groups) for path, groups in EXPORTS.items()})


def write(settings: Settings, root: Path = ROOT) -> None:
    """Write every export under ``root``."""
    for path, text in exports(settings).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def _export(uv: str, groups: tuple[str, ...]) -> str:
    wanted = [word for group in groups for word in ("--group", group)]
    quiet = ["--no-header", "--no-annotate", "--no-default-groups"]
    command = [uv, "export", "--project", str(ROOT), "--frozen", "--offline", *quiet, *wanted]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _with_headers(texts: dict[str, str]) -> dict[str, str]:
    width = max(len(name) for name in ORDERED) + 2
    lines = [f"#   {name:<{width}}{_places(distribution, texts)}" for name, distribution in ORDERED.items()]
    block = ["# Where each of the nine packages of the order lives:", *lines]
    headers = {
        path: ["# Made by `make lock` from uv.lock; not edited by hand.", *(block if path == "requirements.txt" else [])]
        for path in texts
    }  # fmt: skip
    return {path: "\n".join(headers[path]) + "\n" + text for path, text in texts.items()}


def _places(distribution: str, texts: dict[str, str]) -> str:
    found: dict[str, list[str]] = {}
    for path, text in texts.items():
        pinned = re.search(rf"^{re.escape(distribution)}(?:\[[^]]*\])?==([^\s;]+)", text, re.MULTILINE)
        if pinned and not (path.endswith("ml-gpu.txt") and f"\n{distribution}==" in "\n" + texts["k8s/images/ml.txt"]):
            found.setdefault(f"{distribution} {pinned[1]}", []).append("this file" if path == "requirements.txt" else path)
    return "; ".join(f"{what}: {' and '.join(paths)}" for what, paths in found.items())


if __name__ == "__main__":
    here = Settings.from_env()
    subprocess.run([envs.uv(here), "lock", "--project", str(ROOT)], check=True)
    write(here)
    sys.stdout.write("".join(f"wrote {path}\n" for path in EXPORTS))
