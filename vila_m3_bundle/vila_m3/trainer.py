"""The training step of every stage: what is trained, the loss over all processes, the optimizer's update."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from monai.engines import Trainer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from vila_m3_common.errors import UserError, near_match_hint

from .adapters import attach_adapter
from .batches import MicroBatch, check_policy
from .checkpoint import DTYPES, PARTS
from .configuration import IGNORED_LABEL
from .model import VilaM3ForConditionalGeneration
from .processor import VilaM3Processor, build_processor

logger = logging.getLogger(__name__)


def world_size() -> int:
    """Return the number of processes of the training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def train_parts(model: VilaM3ForConditionalGeneration, parts: Sequence[str]) -> VilaM3ForConditionalGeneration:
    """Let only the named parts learn.

    Layers of the tower behind the one whose features are read get no gradient and are frozen with it.

    Args:
        model: changed in place, and returned.
        parts: of ``llm``, ``vision_tower``, ``mm_projector``.

    Raises:
        UserError: for no part, or an unknown one.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r}; {near_match_hint(part, PARTS)}valid: {', '.join(PARTS)}")
    if not parts:
        raise UserError(f"no part is trained; name at least one of {', '.join(PARTS)}")
    unused = _unused_prefixes(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in parts and not name.startswith(unused))
    return model


def _unused_prefixes(model: VilaM3ForConditionalGeneration) -> tuple[str, ...]:
    layers = len(model.vision_tower.encoder.layers)
    layer = model.config.vision_feature_layer
    first = layer if layer >= 0 else layers + 1 + layer
    behind = [f"vision_tower.encoder.layers.{index}." for index in range(first, layers)]
    return (*behind, "vision_tower.post_layernorm.", "vision_tower.head.")


def train_adapter(model: VilaM3ForConditionalGeneration, **options: Any) -> VilaM3ForConditionalGeneration:
    """Let only an adapter learn; options as of :func:`vila_m3.adapters.attach_adapter`.

    Returns:
        The model itself, with the adapter in its layers; ``model.adapter`` is peft's wrapper of it, kept out of the
        model's own modules.
    """
    unused = _unused_prefixes(model)
    adapted = attach_adapter(model, **options)
    for name, parameter in model.named_parameters():
        if name.startswith(unused):
            parameter.requires_grad_(False)
    object.__setattr__(model, "adapter", adapted)
    return model


def stage_processor(
    tokenizer: PreTrainedTokenizerBase, model: VilaM3ForConditionalGeneration, template: str | None, max_length: int
) -> VilaM3Processor:
    """Return the processor of a stage.

    Args:
        tokenizer: of the model.
        model: that is trained.
        template: of the conversations in this stage; None takes the model's.
        max_length: longest conversation in tokens.
    """
    processor = build_processor(tokenizer, model.config)
    processor.template_name = template or processor.template_name
    processor.context_length = min(max_length, processor.context_length)
    return processor


def prepare_model(
    model: VilaM3ForConditionalGeneration,
    parts: Sequence[str],
    adapter: Mapping[str, Any] | None = None,
    recomputes: bool = False,
) -> VilaM3ForConditionalGeneration:
    """Choose what learns.

    Args:
        model: changed in place, and returned.
        parts: see :func:`train_parts`.
        adapter: arguments of :func:`train_adapter`, which then learns in place of the parts.
        recomputes: whether activations are computed again in the backward pass.
    """
    prepared = train_parts(model, parts) if adapter is None else train_adapter(model, **adapter)
    return checkpoint_gradients(prepared) if recomputes else prepared


def checkpoint_gradients(model: VilaM3ForConditionalGeneration) -> VilaM3ForConditionalGeneration:
    """Compute activations of each layer again in the backward pass instead of keeping them."""
    for part in (model.llm, model.vision_tower):
        part.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class SupervisedLoss(nn.Module):
    """The model with its loss: summed cross-entropy of the supervised tokens of a micro-batch.

    Logits are computed only where some row is supervised, which is the smaller part of a conversation: cards,
    questions and images are not.

    Args:
        model: the model that learns.
        always_sees: whether a batch without images runs the tower on an empty one, so that all processes of a training
            meet in the same layers; the value does not reach the loss.
    """

    def __init__(self, model: VilaM3ForConditionalGeneration, always_sees: bool = False) -> None:
        super().__init__()
        self.model = model
        self.always_sees = always_sees

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the summed loss of a micro-batch (see :mod:`vila_m3.batches` for the shapes)."""
        targets = labels[:, 1:]
        columns = (targets != IGNORED_LABEL).any(dim=0).nonzero()[:, 0]
        if not len(columns):
            columns = columns.new_zeros(1)
        logits = self.model(
            inputs_embeds=self._embed(input_ids, pixel_values),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=columns,
        ).logits
        return nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets[:, columns].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        if len(pixel_values):
            return self.model.embed(input_ids, self.model.encode_images(pixel_values))
        embeddings = self.model.embed(input_ids)
        if not self.always_sees:
            return embeddings
        size = self.model.config.vision_config.image_size
        empty = torch.zeros(1, 3, size, size, device=input_ids.device)
        return embeddings + 0.0 * self.model.encode_images(empty).sum()


def learner(model: VilaM3ForConditionalGeneration, mode: str = "single", dtype: str = "float32") -> nn.Module:
    """Wrap a model for training.

    Args:
        model: on its device.
        mode: ``single`` process, ``ddp`` (each process holds all) or ``fsdp`` (each holds a share of every layer).
        dtype: in which ``fsdp`` computes; shares and their gradients' sums stay float32.

    Raises:
        UserError: for an unknown mode.
    """
    modes = ("single", "ddp", "fsdp")
    if mode not in modes:
        raise UserError(f"unknown mode {mode!r}; {near_match_hint(mode, modes)}valid: {', '.join(modes)}")
    loss = SupervisedLoss(model, always_sees=mode != "single")
    if mode == "ddp":
        ids = [model.device] if model.device.type == "cuda" else None
        return DistributedDataParallel(loss, device_ids=ids)
    return shard(loss, dtype) if mode == "fsdp" else loss


def shard(loss: SupervisedLoss, dtype: str = "float32") -> nn.Module:
    """Spread parameters, gradients and optimizer state over all processes, layer by layer (FSDP2)."""
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
    if dtype == "float32":
        policy = MixedPrecisionPolicy()
    model = loss.model
    for layer in [*model.vision_tower.encoder.layers, *model.llm.model.layers]:
        fully_shard(layer, mp_policy=policy)
    fully_shard(loss, mp_policy=policy)
    return loss


def whole_model(model: VilaM3ForConditionalGeneration, network: nn.Module) -> VilaM3ForConditionalGeneration | None:
    """Return the model to generate with or to write: itself, or of shares on all processes a copy on rank 0.

    All processes must call this together.

    Args:
        model: that is trained.
        network: what :func:`learner` made of it.

    Returns:
        The model; None on the other processes of ``fsdp``.
    """
    if not isinstance(network, FSDPModule):
        return model
    if getattr(model, "adapter", None) is not None:
        raise UserError("an adapter is not trained in shares; use multi_gpu_train.json, which holds the model whole")
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    copied = VilaM3ForConditionalGeneration(copy.deepcopy(model.config))
    copied.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    copied.stored, copied.generation_config = model.stored, model.generation_config
    return copied


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return what learns, for the optimizer."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float = 0.03) -> LRScheduler:
    """Linear warm-up over a share of the steps (rounded up), then half a cosine to 0."""
    warmup = -int(-steps * warmup_ratio // 1)
    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


class WeightAverage:
    """Exponential moving average of the trained weights.

    Args:
        network: whose weights.
        decay: share of the average that stays in a step.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.weights = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self.averages = {name: value.detach().clone() for name, value in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        for name, value in self.weights.items():
            self.averages[name].lerp_(value, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network have the averages for a while, to validate or export them."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.weights.items():
            kept = value.clone()
            value.copy_(self.averages[name])
            self.averages[name].copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averages by name."""
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up the averages of an interrupted training."""
        for name, value in self.averages.items():
            value.copy_(state[name])


def supervised_count(micro: MicroBatch) -> int:
    """Return the number of tokens that a micro-batch is supervised at."""
    return int((micro["labels"][:, 1:] != IGNORED_LABEL).sum())


class StageTrainer(Trainer):
    """One iteration is one optimizer step over the micro-batches of a step.

    The loss is the mean over all supervised tokens of the step, of all micro-batches and processes together: the
    same for any split. (DDP and FSDP average gradients over processes, so each one's share counts ``world_size`` fold,
    as in VILA.)

    Args:
        device: where it runs.
        max_epochs: number of epochs.
        train_data_loader: gives lists of micro-batches.
        network: what :func:`learner` returned.
        optimizer: of the trained parameters.
        epoch_length: steps of an epoch; None takes the loader's length.
        amp_dtype: ``float32``, ``bfloat16`` or ``float16`` (with a gradient scaler).
        max_grad_norm: gradients are scaled down to this norm; None does not.
        average: a moving average to keep up.
        on_nan: ``stop`` at a loss that is not finite, or ``skip`` the step.
        train_handlers: attached in their order.

    Raises:
        UserError: for an unknown dtype or policy.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Any,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch_length: int | None = None,
        amp_dtype: str = "float32",
        max_grad_norm: float | None = 1.0,
        average: WeightAverage | None = None,
        on_nan: str = "stop",
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        if amp_dtype not in DTYPES:
            raise UserError(f"unknown amp_dtype {amp_dtype!r}; valid: {', '.join(DTYPES)}")
        self.network = network
        self.optimizer = optimizer
        self.average = average
        self.max_grad_norm = max_grad_norm
        self.on_nan = check_policy("on_nan", on_nan)
        self.amp_dtype = DTYPES[amp_dtype]
        self.grad_scaler = torch.amp.GradScaler(torch.device(device).type, enabled=amp_dtype == "float16")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            iteration_update=None,
            handlers=train_handlers,
            decollate=False,
        )

    def _iteration(self, engine: Engine, micros: list[MicroBatch]) -> dict[str, Any]:
        """Make one step; the output has ``loss``, ``grad_norm`` and counts of this process's tokens and images."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        count = self._sum(sum(map(supervised_count, micros)))
        loss = self._sum(self._backward(micros, max(1.0, count))) / world_size()
        output = {
            "loss": loss,
            "grad_norm": float("nan"),
            "tokens": sum(int(micro["position_ids"].numel()) for micro in micros),
            "images": sum(len(micro["pixel_values"]) for micro in micros),
            "supervised": count,
        }
        if count and torch.isfinite(torch.tensor(loss)):
            output["grad_norm"] = self._update()
        else:
            self._refuse(loss, count)
        return output

    def _backward(self, micros: list[MicroBatch], count: float) -> float:
        total = 0.0
        for index, micro in enumerate(micros):
            moved = {name: value.to(self.state.device, non_blocking=True) for name, value in micro.items()}
            with self._synchronized(index == len(micros) - 1):
                with torch.autocast(
                    torch.device(self.state.device).type, self.amp_dtype, enabled=self.amp_dtype != torch.float32
                ):
                    loss = self.network(**moved) * (world_size() / count)
                self.grad_scaler.scale(loss).backward()
            total += float(loss.detach())
        return total

    def _synchronized(self, is_last: bool) -> AbstractContextManager:
        """Processes exchange gradients in the last micro-batch alone."""
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(is_last)
        elif isinstance(self.network, DistributedDataParallel) and not is_last:
            return self.network.no_sync()
        return nullcontext()

    def _update(self) -> float:
        self.grad_scaler.unscale_(self.optimizer)
        bound = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        norm = nn.utils.clip_grad_norm_(trained_parameters(self.network), bound)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.average is not None:
            self.average.update()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _refuse(self, loss: float, count: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        what = f"the loss is {loss}" if count else "no token is supervised"
        problem = f"step {self.state.iteration}: {what}"
        if self.on_nan == "stop":
            raise UserError(f"{problem}; lower the learning rate, look at the data, or set on_nan to skip")
        logger.warning("skipped %s", problem)

    def _sum(self, value: float) -> float:
        if world_size() == 1:
            return float(value)
        total = torch.tensor(float(value), dtype=torch.float64, device=self.state.device)
        dist.all_reduce(total)
        return float(total)
