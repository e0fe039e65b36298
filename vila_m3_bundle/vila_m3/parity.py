"""Compares a checkpoint with tensors recorded from the original code: one verdict per recorded quantity.

A recording is an ``.npz`` file and a ``cases.json`` with prompts; what they hold under which name is described in
``docs/parity.md``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria

from vila_m3_common.chat_template import Rendered
from vila_m3_common.errors import UserError, exits_with_message

from .answer import eos_ids
from .checkpoint import load_checkpoint, load_processor
from .configuration import IMAGE_TOKEN_ID
from .image_processor import as_tensor
from .model import VilaM3ForConditionalGeneration
from .packing import Spliced, expand_image_places, pack, splice
from .processor import VilaM3Processor

# What the recording gives and nothing computes.
_INPUTS = ("pixel_values", "batch.input_ids", "batch.attention_mask", "batch.labels", "batch.image_index")
# fp32, eager attention, CPU: largest absolute difference that still counts as the same computation.
TOLERANCES = {"embedding": 1e-5, "logits": 2e-5, "loss": 1e-5, "gradient": 1e-4, "exact": 0.0}


@dataclass(frozen=True)
class Row:
    """One compared quantity.

    Args:
        name: key in the recording.
        kind: key of the tolerances; ``gradient`` is relative to the largest recorded value, the others absolute.
        difference: largest difference; infinite for another shape.
        tolerance: what is allowed.
    """

    name: str
    kind: str
    difference: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance


class Parity:
    """Computes the recorded quantities of one checkpoint and compares them.

    Args:
        model: the checkpoint's model.
        processor: its processor.
        recorded: the recording, name -> array.
        cases: case name -> ``prompt``, ``images`` (rows of ``pixel_values``), ``stop_str``, ``generated_text``.
        pictures: the pictures behind ``pixel_values``; None takes the recorded values as they are.
        tolerances: kind -> allowed difference.
    """

    def __init__(
        self,
        model: VilaM3ForConditionalGeneration,
        processor: VilaM3Processor,
        recorded: Mapping[str, np.ndarray],
        cases: Mapping[str, Any],
        pictures: Sequence[Image.Image] | None = None,
        tolerances: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.recorded = recorded
        self.tokenizer_facts = cases.get("tokenizer", {})
        self.cases = {name: case for name, case in cases.items() if name != "tokenizer"}
        self.tolerances = {**TOLERANCES, **(tolerances or {})}
        self.pictures = pictures
        self.seen = set(_INPUTS)

    def rows(self) -> Iterator[Row]:
        """Yield a row for every recorded quantity that is known here; :attr:`unknown` then names the others."""
        parts: tuple[Callable[[], Iterator[Row]], ...] = (
            self._tokenizer_rows,
            self._vision_rows,
            self._case_rows,
            self._batch_rows,
            self._gradient_rows,
        )
        for part in parts:
            yield from part()

    @property
    def unknown(self) -> list[str]:
        """Recorded names that were not compared."""
        return sorted(set(self.recorded) - self.seen)

    def _compare(self, name: str, kind: str, computed: Any, where: np.ndarray | None = None) -> Iterator[Row]:
        """Compare with a recorded array, when it was recorded.

        Args:
            name: key in the recording.
            kind: key of the tolerances.
            computed: array of the same shape, or a function that gives it.
            where: mask ``(B, L)`` of what counts; None for all.
        """
        if name not in self.recorded:
            return
        self.seen.add(name)
        found = computed() if callable(computed) else computed
        found = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        yield Row(name, kind, _difference(self.recorded[name], found, where, kind), self.tolerances[kind])

    def _tokenizer_rows(self) -> Iterator[Row]:
        tokenizer = self.processor.tokenizer
        facts = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
            "len": len(tokenizer),
        }
        for name, found in facts.items():
            if name in self.tokenizer_facts:
                difference = 0.0 if found == self.tokenizer_facts[name] else float("inf")
                yield Row(f"tokenizer.{name}", "exact", difference, 0.0)

    @torch.no_grad()
    def _vision_rows(self) -> Iterator[Row]:
        if "pixel_values" not in self.recorded:
            return
        if self.pictures is not None:
            yield from self._compare(
                "pixel_values", "embedding", as_tensor(self.pictures, self.processor.image_processor)
            )
        states = self.model.vision_states(self._pixels())
        yield from self._compare("vision_hidden_states_all", "embedding", lambda: torch.stack(states))
        features = self.model.select_features(states[self.model.config.vision_feature_layer])
        yield from self._compare("vision_features", "embedding", features)
        yield from self._compare("projector_out", "embedding", lambda: self.model.encode_images(self._pixels()))

    def _pixels(self, rows: Any = slice(None)) -> torch.Tensor:
        return torch.from_numpy(self.recorded["pixel_values"][rows]).to(self.model.device)

    @torch.no_grad()
    def _case_rows(self) -> Iterator[Row]:
        for name, case in self.cases.items():
            prompt = Rendered(case["prompt"], ())
            tokens, _ = self.processor.tokenize_chunks(prompt)
            yield from self._compare(f"{name}.input_ids", "exact", [tokens])
            input_ids = self._expand(tokens)
            embeddings = self.model.embed(input_ids, self._features(case["images"]))
            yield from self._compare(f"{name}.inputs_embeds", "embedding", embeddings)
            yield from self._compare(
                f"{name}.logits", "logits", lambda e=embeddings: self.model(inputs_embeds=e).logits
            )
            yield from self._generation_rows(name, case, embeddings)

    def _expand(self, tokens: list[int]) -> torch.Tensor:
        expanded, _ = expand_image_places(tokens, self.model.tokens_per_image)
        return torch.tensor([expanded], device=self.model.device)

    def _features(self, rows: Any) -> torch.Tensor | None:
        return self.model.encode_images(self._pixels(rows)) if len(rows) else None

    def _generation_rows(self, name: str, case: Mapping[str, Any], embeddings: torch.Tensor) -> Iterator[Row]:
        """Greedy ids; the recorded ones begin with one start token that the original put there by mistake."""
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        stopped, free = f"{name}.generated_ids", f"{name}.generated_ids_nostop"
        if stopped in self.recorded:
            ids = self._generate(embeddings, mask, 2, 20, case.get("stop_str"))
            yield from self._compare(stopped, "exact", self._with_start(ids, stopped))
            if "generated_text" in case:
                is_same = _plain(self.processor.decode(ids[0].tolist()), case) == _plain(case["generated_text"], case)
                yield Row(f"{name}.generated_text", "exact", 0.0 if is_same else float("inf"), 0.0)
        if free in self.recorded:
            count = self.recorded[free].shape[1] - 1
            yield from self._compare(
                free, "exact", self._with_start(self._generate(embeddings, mask, count, count), free)
            )

    def _generate(
        self, embeddings: torch.Tensor, mask: torch.Tensor, least: int, most: int, stop_text: str | None = None
    ) -> torch.Tensor:
        """Generate greedily as the recording did: ``least`` holds back the end token, not the stop text."""
        return self.model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            min_new_tokens=least,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=sorted(eos_ids(self.model)) or None,
            pad_token_id=self.processor.pad_id,
            stopping_criteria=[StopText(self.processor, stop_text)] if stop_text else None,
        )

    def _with_start(self, ids: torch.Tensor, name: str) -> np.ndarray:
        return np.concatenate([self.recorded[name][:, :1], ids.cpu().numpy()], axis=1)

    def _batch_rows(self) -> Iterator[Row]:
        if "batch.input_ids" not in self.recorded:
            return
        with torch.no_grad():
            rows, labels = self._embedded_batch()
            for side in ("right", "left"):
                yield from self._padded_rows(f"batch_{side}", splice(rows, labels, side))
            yield from self._packed_rows(splice(rows, labels))
            for name in self.recorded:
                length = re.fullmatch(r"trunc(\d+)\.inputs_embeds", name)
                if length:
                    yield from self._spliced_rows(f"trunc{length[1]}", splice(rows, labels, max_length=int(length[1])))

    def _embedded_batch(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Embed the recorded batch row by row, without its padding."""
        images = iter(self.recorded["batch.image_index"].tolist())
        embedded, labels = [], []
        for row, mask in enumerate(self.recorded["batch.attention_mask"].astype(bool)):
            tokens = self.recorded["batch.input_ids"][row][mask].tolist()
            targets = self.recorded["batch.labels"][row][mask].tolist()
            expanded, expanded_labels = expand_image_places(tokens, self.model.tokens_per_image, targets)
            image_rows = [next(images) for token in tokens if token == IMAGE_TOKEN_ID]
            input_ids = torch.tensor([expanded], device=self.model.device)
            embedded.append(self.model.embed(input_ids, self._features(image_rows))[0])
            labels.append(torch.tensor(expanded_labels, device=self.model.device))
        return embedded, labels

    def _padded_rows(self, name: str, batch: Spliced) -> Iterator[Row]:
        yield from self._spliced_rows(name, batch)
        mask = batch.attention_mask
        outputs = self.model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=mask.long(),
            position_ids=batch.position_ids,
            labels=batch.labels,
        )
        yield from self._compare(f"{name}.logits", "logits", outputs.logits, mask.cpu().numpy())
        yield from self._compare(f"{name}.loss", "loss", outputs.loss)
        if name == "batch_right":
            yield from self._compare("batch.forward_loss", "loss", outputs.loss)
        generated = f"{name}.generated_ids"
        if generated in self.recorded:
            count = self.recorded[generated].shape[1] - 1
            ids = self._generate(batch.inputs_embeds, mask.long(), count, count)
            yield from self._compare(generated, "exact", self._with_start(ids, generated))

    def _spliced_rows(self, name: str, batch: Spliced) -> Iterator[Row]:
        yield from self._compare(f"{name}.inputs_embeds", "embedding", batch.inputs_embeds)
        yield from self._compare(f"{name}.attention_mask", "exact", batch.attention_mask)
        yield from self._compare(f"{name}.position_ids", "exact", batch.position_ids)
        yield from self._compare(f"{name}.labels", "exact", batch.labels)

    def _packed_rows(self, batch: Spliced) -> Iterator[Row]:
        yield from self._spliced_rows("repack", pack(batch, self.processor.pad_id))
        lengths = torch.sort(batch.attention_mask.sum(dim=1), descending=True).values
        yield from self._compare("repack.sorted_seqlens", "exact", lengths)

    def _gradient_rows(self) -> Iterator[Row]:
        """Gradients of the right-padded batch's loss, under the original's parameter names."""
        named = [name for name in self.recorded if name.startswith("grad.")]
        if not named and "grad_none" not in self.recorded:
            return
        self.model.zero_grad()
        rows, labels = self._embedded_batch()
        batch = splice(rows, labels)
        self.model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
            labels=batch.labels,
        ).loss.backward()
        gradients = {_without_wrapper(name): value.grad for name, value in self.model.named_parameters()}
        for name in named:
            found = gradients.get(_without_wrapper(name.removeprefix("grad.")))
            yield from self._compare(name, "gradient", np.zeros(0) if found is None else found)
        if "grad_none" in self.recorded:
            self.seen.add("grad_none")
            without = {name for name, gradient in gradients.items() if gradient is None}
            is_same = without == {_without_wrapper(str(name)) for name in self.recorded["grad_none"]}
            yield Row("grad_none", "exact", 0.0 if is_same else float("inf"), 0.0)
        self.model.zero_grad()


def _without_wrapper(name: str) -> str:
    """The original wraps its tower in a class of its own: ``vision_tower.vision_tower.vision_model...``."""
    return re.sub(r"^vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower.", name)


class StopText(StoppingCriteria):
    """Ends a generation whose last tokens, or whose text, hold a stop text.

    Args:
        processor: decodes.
        text: where to stop.
    """

    def __init__(self, processor: VilaM3Processor, text: str) -> None:
        self.processor = processor
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return ``(B,)`` bool, whether each row is done."""
        texts = [self.processor.decode(row.tolist(), skip_special_tokens=False) for row in input_ids]
        return torch.tensor([self.text in text for text in texts], device=input_ids.device)


def _plain(text: str, case: Mapping[str, Any]) -> str:
    text = text.strip()
    stop = case.get("stop_str") or ""
    return text.removesuffix(stop).strip() if stop else text


def _difference(expected: np.ndarray, found: np.ndarray, where: np.ndarray | None, kind: str) -> float:
    """Return the largest difference; of gradients relative to the largest recorded value."""
    if expected.shape != found.shape:
        return float("inf")
    if where is not None:
        expected, found = expected[where], found[where]
    if expected.size == 0:
        return 0.0
    difference = float(np.abs(expected.astype(np.float64) - found.astype(np.float64)).max())
    if kind != "gradient":
        return difference
    scale = float(np.abs(expected).max())
    return difference / scale if scale else difference


@exits_with_message
def run_parity(
    checkpoint: str,
    recorded: str,
    cases: str,
    images: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "eager",
    tolerances: Mapping[str, float] | None = None,
) -> None:
    """Print a row per recorded quantity and end the process with status 1 when one is beyond its tolerance.

    Args:
        checkpoint: folder in either layout.
        recorded: the ``.npz`` recording.
        cases: ``cases.json``; the checkpoint's key in it is the recording's file name without suffix.
        images: folder with the pictures ``img0.png``, ``img1.png``, ... behind ``pixel_values``, to compare the
            preprocessing too.
        device: where the model runs.
        dtype: of the weights; other than float32 needs wider ``tolerances``.
        attention: ``eager`` or ``sdpa``.
        tolerances: kind -> allowed difference, over the defaults.

    Raises:
        UserError: if a file is missing or damaged, or the cases do not know the recording.
    """
    recording = read_recording(recorded)
    chosen = read_cases(cases, Path(recorded).stem)
    pictures = read_pictures(images, len(recording.get("pixel_values", ()))) if images else None
    model = load_checkpoint(checkpoint, device, dtype, attention=attention)
    parity = Parity(model, load_processor(checkpoint), recording, chosen, pictures, tolerances)
    rows = []
    for row in parity.rows():
        rows.append(row)
        verdict = "equal" if row.is_equal else "DIFFERENT"
        print(f"{row.name:78} {row.kind:9} {row.difference:9.2e} of {row.tolerance:.0e}  {verdict}", flush=True)
    for name in parity.unknown:
        print(f"{name:78} not compared: unknown to this command")
    failed = [row.name for row in rows if not row.is_equal]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} recorded quantities differ: {', '.join(failed)}")
    if not rows:
        raise UserError(f"recording {recorded} holds nothing that this command knows; see docs/parity.md")
    print(f"all {len(rows)} recorded quantities are equal within their tolerances")


def read_pictures(folder: str, count: int) -> list[Image.Image]:
    """Read ``img0.png`` and its followers.

    Raises:
        UserError: if one is missing or no picture.
    """
    try:
        return [Image.open(Path(folder) / f"img{index}.png") for index in range(count)]
    except OSError as error:
        raise UserError(f"{error}; --images takes the folder with img0.png to img{count - 1}.png") from error


def read_recording(path: str) -> dict[str, np.ndarray]:
    """Read an ``.npz`` recording.

    Raises:
        UserError: if it is missing, damaged, or holds pickled objects.
    """
    try:
        with np.load(path, allow_pickle=False) as opened:
            return dict(opened)
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise UserError(f"recording {path} cannot be read ({error}); give the .npz file of the checkpoint") from error


def read_cases(path: str, key: str) -> dict[str, Any]:
    """Read the cases of one checkpoint.

    Raises:
        UserError: if the file is missing or damaged, or has no such key.
    """
    try:
        known = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cases {path} cannot be read ({error}); give the recording's cases.json") from error
    if key not in known:
        raise UserError(f"cases {path} do not know {key!r}, the recording's name; known: {', '.join(known)}")
    return known[key]
