"""The training step of every stage: what is trained, the loss over all processes, the optimizer's update."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from ignite.engine import Engine
from monai.engines import Trainer
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from vila_m3_common.errors import UserError, check_choice
from vila_m3_common.training import process_rank

from .adapters import attach_adapter
from .augmentation import Augmentation
from .batches import MicroBatch, check_policy, empty_micro_batch
from .checkpoint import DTYPES, PARTS
from .configuration import IGNORED_LABEL
from .model import VilaM3ForConditionalGeneration
from .packed_attention import spans_of, use_packed_attention
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
        check_choice(part, PARTS, "part")
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
    tokenizer: PreTrainedTokenizerBase,
    model: VilaM3ForConditionalGeneration,
    template: str | None,
    max_length: int,
    picture_scale: float = 1.0,
) -> VilaM3Processor:
    """Return the processor of a stage.

    Args:
        tokenizer: of the model.
        model: that is trained.
        template: of the conversations in this stage; None takes the model's.
        max_length: longest conversation in tokens.
        picture_scale: side of the pictures in that of the model's; a larger one is for an augmentation to cut from.

    Raises:
        UserError: for a scale below 1.
    """
    if picture_scale < 1:
        raise UserError(
            f"picture_scale {picture_scale} is below 1; give 1, or such as 1.25 for pictures cut from larger ones"
        )
    processor = build_processor(tokenizer, model.config)
    processor.image_processor.size = round(picture_scale * processor.image_processor.size)
    processor.template_name = template or processor.template_name
    processor.context_length = min(max_length, processor.context_length)
    return processor


def prepare_model(
    model: VilaM3ForConditionalGeneration,
    parts: Sequence[str],
    adapter: Mapping[str, Any] | None = None,
    recomputes: bool = False,
    dropout: float = 0.0,
) -> VilaM3ForConditionalGeneration:
    """Choose what learns, and how.

    Args:
        model: changed in place, and returned.
        parts: see :func:`train_parts`.
        adapter: arguments of :func:`train_adapter`, which then learns in place of the parts.
        recomputes: whether activations are computed again in the backward pass.
        dropout: see :func:`drop_residuals`.
    """
    drop_residuals(model, dropout)
    prepared = train_parts(model, parts) if adapter is None else train_adapter(model, **adapter)
    return checkpoint_gradients(prepared) if recomputes else prepared


def drop_residuals(model: VilaM3ForConditionalGeneration, share: float) -> None:
    """Drop a share of what each layer of the LLM adds to the residual stream, in training alone.

    Few questions shown often are learnt by heart otherwise.

    Args:
        model: gets hooks, which are not part of its weights.
        share: that is dropped.

    Raises:
        UserError: for a share that is not in 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UserError(f"dropout {share} is no share; give 0 for none, or such as 0.1")

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return nn.functional.dropout(output[0], share, module.training), *output[1:]
        return nn.functional.dropout(output, share, module.training)

    for layer in model.llm.model.layers if share else ():
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


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
        self.attends_in_spans = use_packed_attention(model.llm)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        shown: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the summed loss of a micro-batch (see :mod:`vila_m3.batches` for the shapes)."""
        targets = labels[:, 1:]
        if shown is not None:
            states = self.model.llm.model(
                inputs_embeds=self._embed(input_ids, pixel_values, shown),
                attention_mask=self._in_parts(attention_mask),
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state
            # Rows of many short answers are supervised at few places, but somewhere in nearly every column.
            kept = targets != IGNORED_LABEL
            logits = self.model.llm.lm_head(states[:, :-1][kept])
            return nn.functional.cross_entropy(logits.float(), targets[kept], reduction="sum")
        columns = (targets != IGNORED_LABEL).any(dim=0).nonzero()[:, 0]
        if not len(columns):
            columns = columns.new_zeros(1)
            targets = labels[:, :1].new_full((len(labels), 1), IGNORED_LABEL)
        logits = self.model(
            inputs_embeds=self._embed(input_ids, pixel_values),
            position_ids=position_ids,
            use_cache=False,
            logits_to_keep=columns,
            **self._attention(attention_mask, position_ids),
        ).logits
        return nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets[:, columns].flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )

    def _attention(self, mask: torch.Tensor | None, position_ids: torch.Tensor) -> dict[str, Any]:
        if mask is not None or not self.attends_in_spans:
            return {"attention_mask": mask}
        # A mask of four axes is handed on as it is, so that none is computed from the positions.
        return {"attention_mask": position_ids.new_zeros(1, 1, 1, 1), "spans": spans_of(position_ids)}

    def _in_parts(self, attends: torch.Tensor | None) -> torch.Tensor | None:
        """Return the mask of shared rows as the attention reads it: bool, or to be added where it is no ``sdpa``."""
        if attends is None or self.attends_in_spans:
            return attends
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros_like(attends, dtype=self.model.dtype).masked_fill(~attends, lowest)

    def _embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, shown: torch.Tensor | None = None
    ) -> torch.Tensor:
        if len(pixel_values):
            features = self.model.encode_images(pixel_values)
            return self.model.embed(input_ids, features if shown is None else features[shown])
        embeddings = self.model.embed(input_ids)
        if not self.always_sees:
            return embeddings
        size = self.model.config.vision_config.image_size
        empty = torch.zeros(1, 3, size, size, device=input_ids.device)
        return embeddings + 0.0 * self.model.encode_images(empty).sum()


def arithmetic(name: str, device: str | torch.device) -> torch.dtype:
    """Return the dtype to compute in.

    Args:
        name: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 where the device multiplies it faster.
        device: an accelerator, or a CPU, of which those with AMX or AVX-512 BF16 have instructions for it.

    Raises:
        UserError: for an unknown name.
    """
    if check_choice(name, ("auto", *DTYPES), "amp_dtype") != "auto":
        return DTYPES[name]
    is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast or torch.device(device).type != "cpu" else torch.float32


def learner(
    model: VilaM3ForConditionalGeneration,
    mode: str = "single",
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Wrap a model for training.

    Args:
        model: on ``device``; for ``fsdp`` in main memory on rank 0, and on the others at least its shape.
        mode: ``single`` process, ``ddp`` (each process holds all) or ``fsdp`` (each holds a share of every layer).
        dtype: see :func:`arithmetic`; what ``fsdp`` computes in, while shares and gradients' sums stay float32.
        device: where it is trained.

    Raises:
        UserError: for an unknown mode, or float16 in shares, whose scaling would differ between processes.
    """
    check_choice(mode, ("single", "ddp", "fsdp"), "mode")
    loss = SupervisedLoss(model, always_sees=mode != "single")
    if mode == "ddp":
        ids = [model.device] if model.device.type == "cuda" else None
        # Buffers are constants here, and processes may compute unlike numbers of micro-batches.
        return DistributedDataParallel(loss, device_ids=ids, broadcast_buffers=False)
    return shard(loss, arithmetic(dtype, device), device) if mode == "fsdp" else loss


def shard(loss: SupervisedLoss, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Spread parameters, gradients and optimizer state over all processes, layer by layer (FSDP2).

    Only rank 0 ever holds the whole model, in main memory; it hands every process its shares on ``device``.
    """
    if dtype == torch.float16:
        raise UserError("float16 is not trained in shares; use bfloat16")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    whole = {name: value for name, value in loss.state_dict().items() if not value.is_meta}
    buffers = {name: value.to(device) for name, value in loss.named_buffers()}
    model = loss.model
    loss.to("meta")
    model.tie_weights()
    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    for layer in [*model.vision_tower.encoder.layers, *model.llm.model.layers]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    loss.to_empty(device=device)
    model.tie_weights()
    for name, value in buffers.items():
        module, _, leaf = name.rpartition(".")
        loss.get_submodule(module)._buffers[leaf] = value
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(loss, whole if process_rank() == 0 else {}, options=options)
    return loss


@contextmanager
def generating(network: nn.Module) -> Iterator[None]:
    """Let all processes of a training generate with the model, ``fsdp`` too, where they must do it together."""
    if not isinstance(network, FSDPModule):
        yield
        return
    network.unshard()
    try:
        yield
    finally:
        network.reshard()


def whole_model(model: VilaM3ForConditionalGeneration, network: nn.Module) -> VilaM3ForConditionalGeneration | None:
    """Return the model to write: itself, or of shares on all processes a copy in rank 0's main memory.

    All processes must call this together.

    Args:
        model: that is trained.
        network: what :func:`learner` made of it.

    Returns:
        The model; None on the other processes of ``fsdp``.
    """
    if not isinstance(network, FSDPModule):
        return model
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if process_rank() != 0:
        return None
    with init_empty_weights(include_buffers=False):
        copied = VilaM3ForConditionalGeneration(copy.deepcopy(model.config))
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        wrapped = get_peft_model(copied, copy.deepcopy(adapter.peft_config["default"]))
        object.__setattr__(copied, "adapter", wrapped)
    copied.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, assign=True)
    copied.tie_weights()
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

    In step n no more than (1 + n) / (10 + n) of the average stays, so that a short training's average is not one of the
    weights that it began with.

    Args:
        network: whose weights.
        decay: share of the average that stays in a step, once there were many; None keeps no average.
    """

    def __init__(self, network: nn.Module, decay: float | None = 0.999) -> None:
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"ema_decay {decay} is not between 0 and 1; give such as 0.999, or null for none")
        self.decay = decay
        named = {} if decay is None else dict(network.named_parameters())
        # DistributedDataParallel stands before the names; a checkpoint may be read without it.
        learns = {name.removeprefix("module."): value for name, value in named.items() if value.requires_grad}
        self.weights = learns
        self.averages = {name: value.detach().clone() for name, value in learns.items()}
        self.steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        self.steps += 1
        count = int(self.steps)
        decay = min(self.decay or 0, (1 + count) / (10 + count))
        for name, value in self.weights.items():
            self.averages[name].lerp_(value, 1 - decay)

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
        """Return the averages by name, and the number of steps they were moved in."""
        return {**self.averages, "steps": self.steps} if self.averages else {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up the averages of an interrupted training."""
        for name, value in self.averages.items():
            value.copy_(state[name])
        if self.averages:
            self.steps.copy_(state["steps"])


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
        amp_dtype: see :func:`arithmetic`; ``float16`` has a gradient scaler.
        max_grad_norm: gradients are scaled down to this norm; None does not.
        average: a moving average to keep up.
        on_nan: ``stop`` at a loss or gradient that is not finite, or ``skip`` the step.
        augmentation: varies the pictures that are learnt from.
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
        augmentation: Augmentation | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        self.augmentation = augmentation
        self.network = network
        self.optimizer = optimizer
        self.average = average or WeightAverage(network, None)
        self.max_grad_norm = max_grad_norm
        self.on_nan = check_policy("on_nan", on_nan)
        self.amp_dtype = arithmetic(amp_dtype, device)
        is_half = self.amp_dtype == torch.float16
        self.grad_scaler = torch.amp.GradScaler(torch.device(device).type, enabled=is_half)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            iteration_update=None,
            handlers=train_handlers,
            decollate=False,
        )

    def _iteration(self, engine: Engine, micros: list[MicroBatch]) -> list[dict[str, Any]]:
        """Make one step; the output has ``loss``, ``grad_norm`` and counts of this process's tokens and images.

        It is a list of one, as MONAI's handlers take the loss from the first of a decollated batch.
        """
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        counts = self._gather([float(sum(map(supervised_count, micros))), float(len(micros))])
        count = float(counts[:, 0].sum())
        # Processes exchange shares and gradients in every micro-batch, so that all must have as many.
        missing = int(counts[:, 1].max()) - len(micros)
        loss = self._backward([empty_micro_batch(micros[0])] * missing + micros, max(1.0, count))
        loss = float(self._gather([loss]).sum()) / world_size()
        output = {
            "loss": loss,
            "grad_norm": float("nan"),
            "tokens": sum(int(micro["position_ids"].numel()) for micro in micros),
            "images": sum(len(micro["pixel_values"]) for micro in micros),
            "supervised": count,
        }
        if not count:
            self._refuse("no token is supervised")
        elif not math.isfinite(loss):
            self._refuse(f"the loss is {loss}")
        else:
            output["grad_norm"] = self._update()
        return [output]

    def _backward(self, micros: list[MicroBatch], count: float) -> float:
        total = 0.0
        device = torch.device(self.state.device)
        for index, micro in enumerate(micros):
            if self.augmentation is not None:
                pixels = self.augmentation(micro["pixel_values"], self.state.iteration, index)
                micro = {**micro, "pixel_values": pixels}
            moved = {name: value.to(device, non_blocking=True) for name, value in micro.items()}
            with self._synchronized(index == len(micros) - 1):
                with torch.autocast(device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32):
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
        """Let the optimizer make its step; return the gradients' norm before they were cut."""
        self.grad_scaler.unscale_(self.optimizer)
        bound = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        found = nn.utils.clip_grad_norm_(trained_parameters(self.network), bound)
        norm = float(found.full_tensor() if isinstance(found, DTensor) else found)
        if not math.isfinite(norm) and not self.grad_scaler.is_enabled():
            self._refuse(f"the gradient's norm is {norm}")
            return norm
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.average.update()
        return norm

    def _refuse(self, what: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        problem = f"step {self.state.iteration}: {what}"
        if self.on_nan == "stop":
            raise UserError(f"{problem}; lower the learning rate, look at the data, or set on_nan to skip")
        logger.warning("skipped %s", problem)

    def _gather(self, values: list[float]) -> torch.Tensor:
        """Return the values of all processes, ``(processes, values)``."""
        mine = torch.tensor([values], dtype=torch.float64)
        if world_size() == 1:
            return mine
        mine = mine.to(self.state.device)
        found = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(found, mine)
        return torch.cat(found).cpu()
