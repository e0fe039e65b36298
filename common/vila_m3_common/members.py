"""Where the member bundles of a composite are: next to it in the checkout, inside it in a packaged zip."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError


def find_member(name: str, bundle_root: str | Path) -> Path:
    """Return the folder of a member bundle.

    Args:
        name: an absolute path, a path relative to the working directory, or a bundle's name.
        bundle_root: root of the composite.

    Raises:
        UserError: if there is no such folder; the message lists where it was looked for.
    """
    root = Path(bundle_root)
    candidates = [root / "members" / name, root.parent / name, root.parent.parent / name, Path(name)]
    if Path(name).is_absolute():
        candidates = [Path(name)]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise UserError(f"bundle {name} was not found (looked for {looked}); give the path of its root folder")
