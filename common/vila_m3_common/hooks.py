"""Opens the workflow of an expert bundle and reads the hook properties that make it an expert.

A bundle declares its hooks as top-level config items (see ``HOOKS``). A segmentation or
classification bundle without them becomes an expert through its ``metadata.json``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow, create_workflow

from . import __version__
from .conversation import Conversation
from .default_hooks import DefaultHooks, card_from_metadata
from .errors import UserError, find_user_error
from .expert import ExpertRequest, ExpertResult, ModelCard

logger = logging.getLogger(__name__)

# hook -> (config id, what it gives); the contract between the composite and its members.
VLM_HOOKS = {
    "answer": (
        "answer",
        "callable: Conversation -> pieces of the next assistant turn; its `notes`, where it has them, then tell what "
        "a reader must know of that turn",
    )
}
HOOKS = {
    "model_card": ("model_card", "ModelCard: name, modality, task, overview, accuracy, valid arguments"),
    "expert_request": ("expert_request", "callable: ExpertRequest -> the bundle's own dataset item"),
    "expert_feedback": ("expert_feedback", "callable: the run's output -> ExpertResult"),
}


class BundleExpert:
    """An expert bundle: the workflow is parsed when created, its network is built at the first trigger.

    Args:
        root: the bundle's folder.
        overrides: config items to override, such as ``{"device": "cpu"}``.

    Raises:
        UserError: if the folder is not a bundle, declares only some of the hooks, or needs another
            version of ``vila_m3_common`` than the one already imported.
    """

    def __init__(self, root: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.root = Path(root).resolve()
        self.metadata = read_metadata(self.root)
        pairs = {"dataset#data": [{}], **(overrides or {})}
        self._workflow: ConfigWorkflow | None = open_workflow(self.root, pairs, HOOKS)
        self._is_loaded = False
        declared = [name for name, (config_id, _) in HOOKS.items() if config_id in self._workflow.parser]
        if declared and len(declared) < len(HOOKS):
            missing = ", ".join(f"{name} ({HOOKS[name][1]})" for name in HOOKS if name not in declared)
            raise UserError(f"bundle {self.root.name} declares only the hooks {declared}; add to its config: {missing}")
        self._has_hooks = bool(declared)
        self.card = self._read_card()

    def _read_card(self) -> ModelCard:
        if not self._has_hooks:
            return card_from_metadata(self.metadata, self.root.name)
        card = self.workflow.model_card
        if not isinstance(card, ModelCard):
            raise UserError(f"model_card of bundle {self.root.name} is a {type(card).__name__}, not a ModelCard")
        return card

    @property
    def workflow(self) -> ConfigWorkflow:
        """The open workflow.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        if self._workflow is None:
            raise RuntimeError(f"expert {self.root.name} has been closed")
        return self._workflow

    @property
    def is_loaded(self) -> bool:
        """Whether the expert has been run, so that its network is in memory."""
        return self._is_loaded

    def run(self, request: ExpertRequest) -> ExpertResult:
        """Run the bundle's workflow on one item and turn its output into an ExpertResult."""
        workflow = self.workflow
        hooks = self._hooks()
        with quiet():
            workflow.dataset.data[0] = {**hooks.expert_request(request), "request": request.to_json()}
            self._is_loaded = True
            try:
                workflow.run()
            except (Exception, SystemExit) as error:
                # Ignite would take the next run for the end of this one and do nothing.
                self._is_loaded = False
                workflow.initialize()
                if isinstance(error, SystemExit):  # a bundle that ends like a command must not end its caller
                    raise find_user_error(error) or UserError(str(error)) from error
                raise
        return hooks.expert_feedback(_last_output(workflow))

    def _hooks(self) -> Any:
        return self.workflow if self._has_hooks else DefaultHooks(self.metadata, self.card)

    def close(self) -> None:
        """Finalize the workflow; safe to call twice."""
        if self._workflow is None:
            return
        workflow, self._workflow = self._workflow, None
        with quiet():
            workflow.finalize()


class BundleVlm:
    """The VLM bundle: its weights are loaded with the first question.

    Args:
        root: the bundle's folder.
        overrides: config items to override, such as ``{"checkpoint": ...}``.

    Raises:
        UserError: if the folder is not a bundle or does not declare the ``answer`` hook.
    """

    def __init__(self, root: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.root = Path(root).resolve()
        self.metadata = read_metadata(self.root)
        self._workflow: ConfigWorkflow | None = open_workflow(self.root, dict(overrides or {}), VLM_HOOKS)
        self.notes: list[str] = []
        if "answer" not in self._workflow.parser:
            raise UserError(f"bundle {self.root.name} declares no hook `answer` ({VLM_HOOKS['answer'][1]})")

    @property
    def hook(self) -> Any:
        """The bundle's ``answer`` hook; getting it loads the weights.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        if self._workflow is None:
            raise RuntimeError("the VLM has been closed")
        with quiet():
            return self._workflow.answer

    def __call__(self, conversation: Conversation) -> Iterator[str]:
        """Yield the next assistant turn piece by piece."""
        answer = self.hook
        yield from answer(conversation)
        self.notes = list(getattr(answer, "notes", ()))

    def close(self) -> None:
        """Finalize the workflow; safe to call twice."""
        workflow, self._workflow = self._workflow, None
        if workflow is not None:
            workflow.finalize()


def open_workflow(root: Path, overrides: Mapping[str, Any], hooks: Mapping[str, tuple[str, str]]) -> ConfigWorkflow:
    """Open the inference workflow of a bundle and add hook properties to it; nothing is built yet."""
    config = find_inference_config(root)
    put_on_path(root)
    with quiet():
        workflow = create_workflow(
            config_file=str(config),
            meta_file=str(root / "configs" / "metadata.json"),
            workflow_type="infer",
            logging_file=False,
            **overrides,
        )
    for name, (config_id, description) in hooks.items():
        workflow.add_property(name=name, required=False, config_id=config_id, desc=description)
    return workflow


def _last_output(workflow: ConfigWorkflow) -> dict[str, Any]:
    """Merge batch and output of the evaluator's single item, as post-processing does."""
    state = workflow.evaluator.state
    batch, output = state.batch, state.output
    first = output[0] if isinstance(output, Sequence) else output
    item = batch[0] if isinstance(batch, Sequence) else batch
    return {**item, **first}


def read_metadata(root: Path) -> dict[str, Any]:
    """Read a bundle's ``configs/metadata.json``.

    Raises:
        UserError: if the folder or the file is missing, or the file is not JSON.
    """
    path = root / "configs" / "metadata.json"
    if not root.is_dir():
        raise UserError(f"expert bundle {root} does not exist; check expert_bundles")
    if not path.is_file():
        raise UserError(f"{root} is no MONAI bundle: configs/metadata.json is missing; give the bundle's root folder")
    try:
        metadata = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    needed = metadata.get("vila_m3_common_version", __version__)
    if needed != __version__:
        raise UserError(
            f"bundle {root.name} needs vila_m3_common {needed}, but {__version__} is already imported; "
            "use bundles of one release"
        )
    return metadata


def find_inference_config(root: Path) -> Path:
    """Return the bundle's ``configs/inference.json`` or its YAML sibling."""
    for suffix in (".json", ".yaml", ".yml"):
        path = root / "configs" / f"inference{suffix}"
        if path.is_file():
            return path
    raise UserError(f"bundle {root.name} has no configs/inference.json; it cannot be used as an expert")


def put_on_path(root: Path) -> None:
    """Let the configs of a bundle import the bundle's package."""
    if str(root) not in sys.path:
        sys.path.insert(1, str(root))


def forget_duplicate_paths() -> None:
    """MONAI's ``run`` inserts the bundle root into ``sys.path`` every time; keep the first of each."""
    sys.path[:] = list(dict.fromkeys(sys.path))


class _Quiet:
    """Disables log lines and warnings of the process while at least one thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._count += 1
            if self._count > 1:
                return
            disabled = logging.root.manager.disable
            logging.disable(max(disabled, logging.WARNING))
            self._restore.callback(logging.disable, disabled)
            self._restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                self._restore.close()
                forget_duplicate_paths()


_QUIET = _Quiet()


def quiet() -> contextlib.AbstractContextManager[None]:
    """Keep MONAI's and ignite's informational log lines and warnings out of a conversation.

    Both are settings of the whole process: of several threads the first one changes them, and the last one puts
    back what was.
    """
    return _QUIET


def open_experts(roots: Sequence[str | Path], overrides: Mapping[str, Any] | None = None) -> dict[str, BundleExpert]:
    """Open several bundles; the names on their cards must differ.

    Args:
        roots: bundle folders.
        overrides: config items to override in every bundle.

    Returns:
        Card name -> expert, in the order given.
    """
    experts: dict[str, BundleExpert] = {}
    try:
        for root in roots:
            expert = BundleExpert(root, overrides)
            if expert.card.name in experts:
                other = experts[expert.card.name].root
                raise UserError(f"{expert.root} and {other} both call themselves {expert.card.name}; keep one of them")
            experts[expert.card.name] = expert
    except BaseException:
        close_experts(experts)
        raise
    return experts


def close_experts(experts: Mapping[str, BundleExpert]) -> None:
    """Finalize every expert, also when one of them fails."""
    for name, expert in experts.items():
        try:
            expert.close()
        except Exception:
            logger.exception("expert %s could not be finalized", name)
