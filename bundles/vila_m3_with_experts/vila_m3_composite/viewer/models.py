"""The opened bundles of the app: each when it is first asked for, the experts with the weights trained last."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vila_m3_common.agent import Agent, Results
from vila_m3_common.errors import UserError, near_match_hint
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.hooks import BundleExpert, BundleVlm, close_experts
from vila_m3_common.members import find_member

from .settings import ViewerSettings


@dataclass(frozen=True)
class _Opened:
    """An opened expert, and when the trained weights that it has were written; None for the bundle's own."""

    expert: BundleExpert
    written: int | None


class ViewerModels:
    """The bundles behind the tasks of the app.

    Opening an expert reads its configs; its network comes with the first image, the VLM's weights with the first
    question. One thread at a time uses them: hold :attr:`lock`.

    Args:
        settings: of the app.

    Raises:
        UserError: if a bundle is not found.
    """

    def __init__(self, settings: ViewerSettings) -> None:
        self.settings = settings
        self.lock = threading.RLock()
        self._composite = settings.composite()
        root = self._composite["bundle_root"]
        found = [find_member(name, root) for name in self._composite["expert_bundles"]]
        self.roots = {folder.name: folder for folder in found}
        self._opened: dict[str, _Opened] = {}

    @property
    def overrides(self) -> dict[str, Any]:
        """Config items that are overridden in every expert."""
        return dict(self._composite["expert_overrides"])

    @property
    def device(self) -> str:
        """Where networks run."""
        return str(self.overrides["device"])

    def root(self, name: str) -> Path:
        """Return the folder of an expert bundle.

        Raises:
            UserError: if the app has no such expert.
        """
        if name not in self.roots:
            raise UserError(
                f"there is no expert {name!r}; {near_match_hint(name, list(self.roots))}experts: "
                f"{', '.join(self.roots)}"
            )
        return self.roots[name]

    def trained_weights(self, name: str) -> Path:
        """Return where trainings put the weights of an expert."""
        return self.settings.model_dir / f"{name}.safetensors"

    def weights_stamp(self, name: str) -> str:
        """Return what tells apart the weights that an expert has had: when the trained ones were written."""
        return str(_written(self.trained_weights(name)) or "as in the bundle")

    def expert(self, name: str) -> BundleExpert:
        """Return an opened expert; one whose weights have been trained since is opened anew."""
        root, written = self.root(name), _written(self.trained_weights(name))
        with self.lock:
            opened = self._opened.get(name)
            if opened is None or opened.written != written:
                trained = {} if written is None else {"checkpoint": str(self.trained_weights(name))}
                fresh = BundleExpert(root, {**self.overrides, **trained})
                if opened is not None:
                    opened.expert.close()
                self._opened[name] = opened = _Opened(fresh, written)
            return opened.expert

    def run(self, name: str, request: ExpertRequest) -> ExpertResult:
        """Run an expert on one request."""
        with self.lock:
            return self.expert(name).run(request)

    @cached_property
    def vlm(self) -> BundleVlm:
        """The VLM; its weights come with the first question."""
        return BundleVlm(self._vlm_root, self._composite["vlm_overrides"])

    @cached_property
    def _vlm_root(self) -> Path:
        return find_member(self._composite["vlm_bundle"], self._composite["bundle_root"])

    def agent(self, results: Results) -> Agent:
        """Return an agent with the experts as they are now.

        Args:
            results: of experts in one conversation, which may be used again.
        """
        experts = {opened.card.name: opened for opened in map(self.expert, self.roots)}
        cards = (self._vlm_root / "configs" / "model_cards.txt").read_text()
        options = {name: self._composite[name] for name in ("variant", "max_expert_calls", "tells_measurements")}
        return Agent(self.vlm, experts, cards, **options, results=results)

    def close(self) -> None:
        """Finalize what is open."""
        with self.lock:
            close_experts({name: opened.expert for name, opened in self._opened.items()})
            self._opened.clear()
            if "vlm" in self.__dict__:
                self.vlm.close()


def _written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
