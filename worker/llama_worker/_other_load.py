"""OtherLoad: what a transfer hears when the model was loaded anew since it was begun, and how equal loads are told."""

from __future__ import annotations

import os
from pathlib import Path

from llama_worker._cache_identity import fingerprint_of
from llama_worker._models import model_files
from llama_worker._view import ModelView


class OtherLoad(Exception):
    """Another load serves by now: its `view` says which. The transfer begins again with it; callers never see this."""

    def __init__(self, view: ModelView) -> None:
        super().__init__(f"{view.info.name} was loaded since")
        self.view = view


def mark_of(view: ModelView) -> bytes | None:
    """The same for two loads of one model, whose files nobody has touched. None when they cannot be looked at.

    Reads nothing of the files, unlike `fingerprint_of`: of use within one process.
    """
    try:
        return fingerprint_of(view, repr((view.info.digest, _stamps(view.info.path))).encode())
    except Exception:  # noqa: BLE001  whoever transfers reads the files himself, and hears what is wrong with them
        return None


def _stamps(path: str) -> list[tuple[str, int, int, int, int]]:
    if "://" in path:
        return []
    stats = [(str(file), os.stat(file)) for file in model_files(Path(path))]
    return [(name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
