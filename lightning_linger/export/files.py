"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from lightning_linger.core.errors import ConfigError


def check_target(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that can be written, before any work is done for it.

    Raises:
        ConfigError: If its folder is missing or read-only, or the path is a folder.
    """
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        msg = f"cannot write {str(target)!r}: the folder {str(folder)!r} does not exist. Create it."
        raise ConfigError(msg)
    if target.is_dir():
        msg = f"cannot write {str(target)!r}: it is a folder. Pass the path of a file."
        raise ConfigError(msg)
    if not os.access(folder, os.W_OK):
        msg = (
            f"cannot write {str(target)!r}: the folder {str(folder)!r} is read-only. Choose "
            "another, or change its permissions."
        )
        raise ConfigError(msg)
    return target


def write_atomically(target: Path, content: bytes) -> None:
    """Write next to the target, then move into its place.

    Raises:
        ConfigError: If the file system refuses.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        msg = f"cannot write {str(target)!r}: {error}."
        raise ConfigError(msg) from error
    finally:
        temporary.unlink(missing_ok=True)
