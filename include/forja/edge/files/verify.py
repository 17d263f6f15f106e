"""Verify: prove this bundle on this device, and write a receipt of it.

First, offline and before anything is loaded: signature, digests, no extra files, target, clock, expiry, no downgrade (``trust.check``).
Then the golden samples through the runtime of this device: shape, finite numbers, tolerance, the order of the labels. Then speed.
A refusal is a receipt too. Python 3.6, numpy.

    python3 verify.py [--etc DIR] [--var DIR] [--receipt FILE]      exit status 0: passed, 3: refused

This script can't vouch for itself. The first bundle of a device is checked by hand (README.txt says how); from then on the installed
update.py checks a bundle before it runs anything of it.
"""
# ruff: noqa: UP006, UP035 (the syntax of Python 3.6)

import argparse
import hashlib
import hmac
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any, Dict, List

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, HERE)

import trust  # type: ignore[import-not-found] # noqa: E402 - beside this file

KIND, SCHEMA = "forja-edge-receipt", 1
WARM_UP, RUNS, MOST_S = 20, 200, 30.0
"""Protocol of the timing: batches before it, batches in it, and the seconds after which it ends early."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Prove this bundle on this device.")
    trust.options(parser)
    parser.add_argument("--receipt", default=os.path.join(HERE, trust.WORK, "receipt.json"), help="where the receipt goes")
    parser.add_argument("--device", default="", help="name of this device; ETC/device or the host name when left out")
    parser.add_argument("--simulated", action="store_true", help="on ONNX Runtime, whatever the target is; the receipt says so")
    parser.add_argument("--only", action="store_true", help="don't remember this version as installed: update.py does that itself")
    given = parser.parse_args()
    receipt = begun(given)
    try:
        manifest = trust.check(HERE, given.etc, given.var)
        receipt.update({n: manifest[n] for n in ("team", "recipe", "target", "variant")})
        receipt["bundle"]["version"] = manifest["version"]
        receipt.update(proven(manifest, given.simulated))
        if not (given.simulated or given.only):
            installed(manifest, receipt["bundle"]["manifest_sha256"], given.var)
        receipt["outcome"] = "passed"
    except trust.Refused as error:
        receipt.update(outcome="refused", rule=error.rule, reason=error.reason)
    try:
        written(receipt, given)
    except OSError as error:
        sys.stderr.write(f"refused: the receipt can't be written: {error}; run it as root, or pass --receipt FILE\n")
        return 3
    print(summary(receipt))
    return 0 if receipt["outcome"] == "passed" else 3


def begun(given: argparse.Namespace) -> Dict[str, Any]:
    """A receipt of which nothing is known but the device, the time and the bytes of the manifest."""
    try:
        manifest_digest = trust.digest(trust.read(os.path.join(HERE, trust.MANIFEST), trust.MOST_JSON))
    except trust.Refused:
        manifest_digest = ""
    return {
        "kind": KIND, "schema": SCHEMA, "team": "", "recipe": "", "target": "", "variant": "",
        "bundle": {"version": 0, "manifest_sha256": manifest_digest},
        "device": device(given), "simulated": bool(given.simulated), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "outcome": "", "rule": "", "reason": "", "runtime": None, "golden": None, "speed": None, "mac": None,
    }  # fmt: skip


def device(given: argparse.Namespace) -> Dict[str, str]:
    """What is known of this device; what can't be found out is empty."""
    return {
        "id": given.device or text(os.path.join(given.etc, "device")) or platform.node(),
        "model": text("/proc/device-tree/model"),
        "l4t": text("/etc/nv_tegra_release")[:80],
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "power_mode": power_mode(),
    }


def text(path: str) -> str:
    """First line of a file, empty when it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(4096).decode("utf-8", "replace").split("\n")[0].strip("\0 ")
    except OSError:
        return ""


def power_mode() -> str:
    """What nvpmodel says of the power mode; empty where there is none."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(done.stdout.decode("utf-8", "replace").split())[:120]


def proven(manifest: Dict[str, Any], simulated: bool) -> Dict[str, Any]:
    """Golden samples and speed on this device's runtime.

    Raises:
        trust.Refused: no runtime, or answers that are not those that the gate judged.
    """
    # Only now: numpy, the runtime and the module that loads it are code and data that trust.check had to pass first.
    import numpy as np
    import runtime  # type: ignore[import-not-found]

    inputs, expected = (np.load(os.path.join(HERE, "golden", n), allow_pickle=False) for n in ("inputs.npy", "outputs.npy"))
    with open(os.path.join(HERE, "golden", "labels.json"), encoding="utf-8") as file:
        labels = json.load(file)
    with open(os.path.join(HERE, "labels.txt"), encoding="utf-8") as file:
        classes = file.read().splitlines()
    try:
        engine = runtime.load(HERE, manifest, simulated)
        step = manifest["batch"]["max"]
        answers = [engine.run(inputs[i : i + step]) for i in range(0, len(inputs), step)]
        golden = compared(answers, expected, labels, classes, manifest)
        speed = runtime.timed(engine, inputs, WARM_UP, RUNS, MOST_S)
    except trust.Refused:
        raise
    except Exception as error:  # what a runtime raises is anything; on a device it must end in a receipt
        raise trust.Refused("runtime", f"{type(error).__name__}: {error}"[:600]) from error
    name = engine.name + (", in place of the device's own" if simulated and manifest["runtime"] != "onnxruntime" else "")
    return {"runtime": {"name": name, "version": engine.version}, "golden": golden, "speed": speed}


def compared(answers: List[Any], expected: Any, labels: List[str], classes: List[str], manifest: Dict[str, Any]) -> Dict[str, Any]:
    """Compare with the golden answers; refused at the first rule that is broken.

    Args:
        answers: float arrays [n, classes], the batches in order.
        expected: float32 [N, classes], what the gate judged.
        labels: name of the class that each golden sample must be answered with.
        classes: lines of labels.txt.
        manifest: the bundle's.
    """
    import numpy as np

    tolerance = float(manifest["tolerance"])
    # Before they are joined: arrays of other shapes can't be.
    shapes = [list(np.shape(a)) for a in answers]
    if any(len(s) != 2 or s[1] != expected.shape[1] for s in shapes) or sum(s[0] for s in shapes) != len(expected):
        raise trust.Refused("golden", f"answers of shape {shapes}, allowed: {list(expected.shape)} in all")
    found = np.concatenate(answers)
    if not np.isfinite(found).all():
        raise trust.Refused("golden", f"{int((~np.isfinite(found)).sum())} probabilities are NaN or infinite")
    worst = float(np.abs(found - expected).max())
    if not worst <= tolerance:
        raise trust.Refused("golden", f"a probability differs by {worst:.4g}, allowed: {tolerance:g}")
    if classes != manifest["classes"]:
        raise trust.Refused("labels", f"labels.txt has {classes[:5]}..., the manifest {manifest['classes'][:5]}...")
    top = np.sort(expected, axis=1)[:, ::-1]
    # Where the two best are closer than twice the tolerance, rounding alone may swap them.
    clear = [i for i in range(len(expected)) if top[i, 0] - top[i, 1] > 2 * tolerance]
    wrong = [i for i in clear if classes[int(found[i].argmax())] != labels[i]]
    if wrong:
        said = classes[int(found[wrong[0]].argmax())]
        raise trust.Refused("labels", f"golden sample {wrong[0]} is called {said!r}, it is {labels[wrong[0]]!r}: labels in another order")
    if not clear:
        raise trust.Refused("labels", "no golden sample has a clear answer, so the order of the labels can't be checked")
    return {"samples": len(expected), "worst": worst, "tolerance": tolerance, "labels_checked": len(clear)}


def installed(manifest: Dict[str, Any], manifest_digest: str, var: str) -> None:
    """Remember what passed: from now on nothing older is accepted."""
    state = trust.load_state(var, manifest)
    if manifest["version"] > state["version"]:
        state.update(version=manifest["version"], manifest=manifest_digest, target=manifest["target"], back="")
        trust.save_state(var, manifest, state)


def written(receipt: Dict[str, Any], given: argparse.Namespace) -> None:
    """Write the receipt, with a MAC when this device has a key (ETC/device.key)."""
    secret = text(os.path.join(given.etc, "device.key"))
    if secret:
        receipt["mac"] = mac(receipt, secret)
    folder = os.path.dirname(os.path.abspath(given.receipt))
    os.makedirs(folder, exist_ok=True)
    with open(given.receipt + ".part", "w") as file:
        json.dump(receipt, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(given.receipt + ".part", given.receipt)


def mac(receipt: Dict[str, Any], secret: str) -> str:
    """HMAC-SHA256 over the receipt without its MAC, as JSON with sorted keys and no spaces."""
    body = json.dumps({**receipt, "mac": None}, sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def summary(receipt: Dict[str, Any]) -> str:
    """One line for people."""
    if receipt["outcome"] != "passed":
        return f"refused: {receipt['rule']}: {receipt['reason']}"
    golden, speed, name = receipt["golden"], receipt["speed"], receipt["runtime"]
    where = "simulated on ONNX Runtime, no device: " if receipt["simulated"] else ""
    return (
        f"passed: {where}{receipt['recipe']} version {receipt['bundle']['version']} for {receipt['target']}, {golden['samples']} golden"
        f" samples differ by {golden['worst']:.1e} at most, {speed['fps']} FPS, p50 {speed['p50_ms']} ms, p99 {speed['p99_ms']} ms"
        f" ({name['name']} {name['version']})"
    )


if __name__ == "__main__":
    sys.exit(main())
