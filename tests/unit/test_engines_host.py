"""What a host says of its GPU, driver and builder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from forja import engines
from forja.engines import host
from forja.engines.host import Host
from forja.errors import Unavailable

pytestmark = pytest.mark.ml


def test_tensorrt_needs_driver_and_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "DRIVER", tmp_path)
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert host.backend() is host.TENSORRT_RTX
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: object())
    assert host.backend() is host.TENSORRT
    monkeypatch.setattr(host, "DRIVER", tmp_path / "none")
    assert host.backend() is host.TENSORRT_RTX


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)\nGCC version:  gcc 12.3.0\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"


def signature(folder: Path, monkeypatch: pytest.MonkeyPatch, driver: str, smi: str = "") -> str:
    """Signature of a host with this driver, whose nvidia-smi is this shell script; empty for none."""
    (folder / "version").write_text(driver)
    monkeypatch.setattr(host, "DRIVER", folder / "version")
    tool = folder / "nvidia-smi"
    tool.unlink(missing_ok=True)
    if smi:
        tool.write_text(f"#!/bin/sh\n{smi}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    return engines.signature()


def test_signature_names_driver_gpu_and_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert signature(tmp_path, monkeypatch, OPEN, "echo 9.0; echo 9.0") == "driver 570.86.15, compute capability 9.0, " + host._library()
    assert signature(tmp_path, monkeypatch, CLOSED, "echo 8.6; echo 8.0").startswith("driver 550.54.15, compute capability 8.0+8.6, ")
    assert host._library().startswith("tensorrt-rtx-cu12 1.")
    for broken in ("", "echo no devices were found; exit 6"):
        assert "compute capability unknown" in signature(tmp_path, monkeypatch, OPEN, broken)


def test_signature_is_empty_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "DRIVER", tmp_path / "none")
    assert engines.signature() == ""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver, and CUDA with two GPUs."""
    import torch

    (tmp_path / "version").write_text(OPEN)
    monkeypatch.setattr(host, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((8, 6), (9, 0))[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ("NVIDIA A10", "NVIDIA H100")[i])
    monkeypatch.setattr(host.importlib, "import_module", lambda name: SimpleNamespace(__version__=f"{name} 1.2.3.4"))


@pytest.mark.usefixtures("gpu")
def test_here_with_a_gpu() -> None:
    assert engines.here(host.TENSORRT) == Host(
        backend="tensorrt", library="tensorrt 1.2.3.4", compute_capability="8.6", gpu="NVIDIA A10", driver="570.86.15"
    )


def test_here_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "DRIVER", tmp_path / "none")
    found = engines.here()
    assert (found.backend, found.compute_capability, found.gpu, found.driver) == ("tensorrt-rtx", "", "", "")
    assert found.library.count(".") == 3


@pytest.mark.usefixtures("gpu")
def test_a_driver_without_a_gpu_for_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match=r"CUDA shows none: got '570\.86\.15'"):
        engines.here(host.TENSORRT)
