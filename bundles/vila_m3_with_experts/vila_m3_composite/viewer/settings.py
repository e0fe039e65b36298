"""How the app is set up: the ``--conf NAME VALUE`` pairs of MONAI Label's start command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from vila_m3_common.errors import UserError, near_match_hint
from vila_m3_common.study import check_sequence_order

# conf name -> meaning; also what the message about an unknown name lists.
CONF = {
    "device": "where networks run, such as cpu or cuda:0",
    "expert_bundles": "names or paths of the expert bundles, separated by commas",
    "vlm_bundle": "name or path of the VLM bundle",
    "vlm_checkpoint": "checkpoint folder of the VLM",
    "sequence_order": "order of the channels of a 4-D brain MRI, such as flair,t1,t1c,t2",
    "model_dir": "folder of the weights that trainings in MONAI Label write",
}
# What MONAI Label adds to an app's conf by itself.
_OF_MONAI_LABEL = ("server_mode",)


@dataclass(frozen=True)
class ViewerSettings:
    """How the app is set up.

    Args:
        bundle_root: root of the composite.
        model_dir: folder of trained weights; created by the first training.
        overrides: config items to override in the composite's ``inference.json``.
    """

    bundle_root: Path
    model_dir: Path
    overrides: Mapping[str, Any]

    @classmethod
    def from_conf(cls, conf: Mapping[str, str], app_dir: str | Path) -> ViewerSettings:
        """Read the conf pairs.

        Args:
            conf: name -> value, see ``CONF``.
            app_dir: folder of the app, inside the composite.

        Raises:
            UserError: for an unknown name or a sequence order that is none.
        """
        given = {name: str(value).strip() for name, value in conf.items() if name not in _OF_MONAI_LABEL}
        for name in given:
            if name not in CONF:
                hint = near_match_hint(name, list(CONF))
                raise UserError(f"unknown --conf {name!r}; {hint}allowed: {', '.join(CONF)}")
        overrides: dict[str, Any] = {name: given[name] for name in ("device", "vlm_bundle") if given.get(name)}
        if given.get("expert_bundles"):
            overrides["expert_bundles"] = _split(given["expert_bundles"])
        if given.get("vlm_checkpoint"):
            overrides["vlm_overrides#checkpoint"] = given["vlm_checkpoint"]
        if given.get("sequence_order"):
            overrides["sequence_order"] = list(check_sequence_order(_split(given["sequence_order"])))
        app_dir = Path(app_dir).resolve()
        return cls(app_dir.parent, Path(given.get("model_dir") or app_dir / "model").absolute(), overrides)

    def composite(self) -> dict[str, Any]:
        """Return the keyword arguments of :class:`vila_m3_composite.app.Composite`, from the composite's config."""
        parser = ConfigParser()
        parser.read_config(str(self.bundle_root / "configs" / "inference.json"))
        parser.update(dict(self.overrides))
        return parser.get_parsed_content("composite")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
