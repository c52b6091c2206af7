"""run.json: how a run was started, so that it can be started again."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynascope.record.model import RecordError
from dynascope.record.schema import RUN_FILE

# What changes how a training runs. The rest of the environment is nobody's business, and may hold secrets.
TOLD = (
    "CUDA_",
    "CUBLAS_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTHONHASHSEED",
    "PYTORCH_",
    "RANK",
    "SLURM_JOB_ID",
    "TORCH",
    "WORLD_SIZE",
)


def write_run_file(folder: Path, config: Mapping[str, Any]) -> None:
    """Write run.json in one piece: arguments, versions, environment, seeds, git state, start, and the configuration."""
    content = {
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in ("dynascope", "torch", "numpy")},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TOLD)},
        "seeds": _seeds(),
        "git": _git_state(os.getcwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dict(config),
    }
    draft = folder / f"{RUN_FILE}.new"
    draft.write_text(json.dumps(content, indent=2, default=_plain) + "\n", encoding="utf-8", errors="replace")
    draft.replace(folder / RUN_FILE)


def read_run_file(folder: Path) -> dict[str, Any]:
    """What run.json holds; empty where there is none, RecordError where it is not JSON."""
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RecordError(f"{path} is not valid JSON ({error}); mend it or remove it") from None
    return dict(content)


@cache  # a study opens hundreds of records in one process
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _seeds() -> dict[str, int]:
    """The seed of PyTorch's generator, where PyTorch is loaded; other generators do not tell theirs."""
    torch = sys.modules.get("torch")
    return {} if torch is None else {"torch": torch.initial_seed()}


@cache
def _git_state(folder: str) -> dict[str, Any] | None:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=2, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
