"""With what and where a run was made."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path

import torch
from torch import nn

from assay.digest import sha256_of_bytes, sha256_of_file, sha256_of_json

PACKAGES = ("torch", "numpy", "scipy", "diffusers", "datasets", "scikit-learn", "pyautoattack", "safetensors",
            "pillow", "robustbench", "timm", "torchvision")  # fmt: skip

_UNRELATED = tuple(f":(top,exclude)leaderboards/{name}" for name in ("records", "tables", "audits", "claims"))
"""What a run may write into its own checkout, and no measurement reads."""


MEASURING = ("assay", "assay.checks", "assay.certificates", "assay.attacks", "assay.defenses")
"""The packages whose code can change a measurement: all but the one that renders tables."""


@lru_cache(maxsize=1)
def code_sha256() -> str:
    """One digest over every source file of this package: uncommitted edits change it too.

    Rendering of tables is left out, since it can't change a measurement.
    """
    hashes: dict[str, str] = {}
    for package in MEASURING:
        folder = Path(str(resources.files(package)))
        for file in sorted(folder.glob("*.py")):
            hashes[f"{package}/{file.name}"] = sha256_of_file(file)
    return sha256_of_json(hashes)


def state_sha256(module: nn.Module) -> str:
    """One digest over a module's parameters and buffers, whatever files they came from."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    contents = [
        [name, str(value.dtype), list(value.shape), sha256_of_bytes(_bytes(value))]
        for name, value in sorted(state.items())
    ]
    return sha256_of_json(contents)


def _bytes(value: torch.Tensor) -> bytes:
    content: bytes = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def package_versions() -> dict[str, str]:
    """The installed version of each package that can change a number."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether it has uncommitted changes; None outside a checkout of this project.

    Published records and the tables made from them are not counted: publishing one row leaves the next one's code
    as it was.
    """
    folder = Path(str(resources.files("assay"))).resolve().parent
    if not (folder / ".git").exists():
        return None, None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", ":/", *_UNRELATED],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head.stdout.strip(), bool(status.stdout.strip())


def machine() -> dict[str, str]:
    """Python's version and the platform, as a record keeps them."""
    return {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def threads() -> int:
    """Torch's number of threads: on a CPU it can change the last bits of a result."""
    return torch.get_num_threads()
