"""The error that a user can act on."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """One line that names what was wrong and the way out; the command line exits with 2 on it."""


def first_line(error: BaseException) -> str:
    """Of a library's message, which may be a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def loading_error(role: str, name: str, what: str, error: Exception) -> UserError:
    """`what` of the model that option `role` calls `name` could not be loaded, and why."""
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or path.exists():
        if not path.is_dir():
            return UserError(f"{role} {name}: no such folder")
        if (path / "adapter_config.json").is_file():
            return UserError(
                f"{role} {name}: this is an adapter, not a model; merge it into its base model "
                "(PeftModel.merge_and_unload) and save that"
            )
        if not (path / "config.json").is_file():
            return UserError(
                f"{role} {name}: no config.json in it; expected a saved model's folder"
            )
    return UserError(
        f"{role} {name}: its {what} could not be loaded ({first_line(error)}); "
        "expected a local folder or the id of a model on the Hub"
    )
