"""Looks at the machine: what a run needs, what is there, and what to do about what is not.

Imports nothing heavy: torch is asked in a process of its own. Knows no config.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NEEDED = (
    "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "pillow", "datasets",
    "huggingface-hub", "llguidance", "numpy", "av",
)  # fmt: skip
OPTIONAL = {
    "s3fs": "for s3:// addresses",
    "gcsfs": "for gs:// addresses",
    "soundfile": "for audio",
    "soxr": "for audio",
}

_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
count = torch.cuda.device_count() if cuda else 0
devices = [torch.cuda.get_device_properties(i) for i in range(count)]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
    "devices": [{"name": d.name, "gib": round(d.total_memory / 2**30, 1),
                 "capability": f"{d.major}.{d.minor}"} for d in devices],
}))
"""


@dataclass(frozen=True)
class Check:
    """One finding: `state` is ok, warn or bad; `advice` says what to do."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine(torch_timeout_sec: float = 120.0) -> list[Check]:
    """All checks, cheap ones first."""
    checks = [_python(), _neighbours()]
    checks += [_package(name) for name in NEEDED]
    checks += [_package(name, purpose) for name, purpose in OPTIONAL.items()]
    checks += [_cores(), _memory(), _shared_memory(), _temporary(), _open_files()]
    checks += _torch(torch_timeout_sec)
    return checks


def report(checks: list[Check]) -> dict[str, Any]:
    worst = max(("ok", "warn", "bad").index(check.state) for check in checks)
    return {"state": ("ok", "warn", "bad")[worst], "checks": [asdict(check) for check in checks]}


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    ok = sys.version_info >= (3, 11)
    return Check("python", "ok" if ok else "bad", found, "" if ok else "Use Python 3.11 or newer.")


def _neighbours() -> Check:
    folder = Path(__file__).resolve().parent.parent
    return Check("installed in", "ok", str(folder))


def _package(name: str, optional_for: str = "") -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        state = "warn" if optional_for else "bad"
        advice = f"pip install {name} {optional_for and '# ' + optional_for}".rstrip()
        return Check(name, state, "not installed", advice)


def _cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("cpu cores", "ok", str(count or 1))


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    few = total < 4
    return Check("memory", "warn" if few else "ok", f"{total:.1f} GiB", "" if not few else "Small.")


def _shared_memory() -> Check:
    folder = "/dev/shm"
    if not os.path.isdir(folder):
        return Check("shared memory", "warn", "no /dev/shm")
    free = shutil.disk_usage(folder).free / 2**30
    if free < 0.5:
        advice = "Give the container more: docker run --shm-size=8g."
        return Check("shared memory", "bad", f"{free:.2f} GiB free", advice)
    return Check("shared memory", "ok", f"{free:.1f} GiB free")


def _temporary() -> Check:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 2**30
    few = free < 2
    advice = "Images of running shards are spooled here; set TMPDIR to a larger disk."
    return Check(
        "temporary files",
        "warn" if few else "ok",
        f"{free:.1f} GiB free in {folder}",
        advice if few else "",
    )


def _open_files() -> Check:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < 1024
    return Check("open files", "warn" if few else "ok", str(soft), "ulimit -n 4096" if few else "")


def _torch(timeout_sec: float) -> list[Check]:
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=timeout_sec
        )
    except subprocess.TimeoutExpired:
        return [Check("torch import", "bad", f"took more than {timeout_sec:.0f} s")]
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return [Check("torch import", "bad", last, "Reinstall torch.")]
    told = json.loads(answer.stdout.splitlines()[-1])
    checks = [Check("torch import", "ok", f"{told['version']}, CUDA {told['cuda'] or 'none'}")]
    for number, device in enumerate(told["devices"]):
        found = f"{device['name']}, {device['gib']} GiB, compute {device['capability']}"
        checks.append(Check(f"gpu {number}", "ok", found))
    if not told["devices"]:
        checks.append(_no_gpu())
    return checks


def _no_gpu() -> Check:
    if (
        shutil.which("nvidia-smi")
        and not subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode
    ):
        advice = "There is a GPU that torch cannot use: install a CUDA build of torch."
        return Check("gpu", "bad", "not usable", advice)
    return Check("gpu", "warn", "none", "Runs on the CPU: right for `model.id: demo` and tests.")
