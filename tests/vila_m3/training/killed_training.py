"""Trains a tiny model in ``argv[1]`` and, after step ``argv[2]``, kills itself; at the end it writes all weights.

With ``argv[3]`` ``ddp`` or ``fsdp`` it runs under torchrun. ``argv[4]`` names the optimizer, ``argv[5]`` the dtype.
Text and pictures are random.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vila_m3.batches import StepBatches, StepCollator, make_loader
from vila_m3.configuration import IGNORED_LABEL, IMAGE_TOKEN_ID
from vila_m3.model import build_model
from vila_m3.processor import Encoded
from vila_m3.run_state import RunState
from vila_m3.trainer import StageTrainer, WeightAverage, learner, train_adapter, train_parts, trained_parameters

SHAPE: dict[str, Any] = {
    "text_config": {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}


class RandomItems:
    """Items of 8 to 24 tokens, and their mixture; every third has no image."""

    sample_lengths = (16,)
    quotas = None
    data_sets = ()

    def __init__(self, places: int) -> None:
        self.places = places

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Encoded:
        generator = torch.Generator().manual_seed(index)
        images = 1 if index % 3 else 0
        text = torch.randint(1, 64, (8 + index,), generator=generator)
        seen = torch.full((images * self.places,), IMAGE_TOKEN_ID)
        labels = torch.cat([torch.full_like(seen, IGNORED_LABEL), text])
        labels[: len(seen) + 4] = IGNORED_LABEL
        pixels = torch.rand(images, 3, 28, 28, generator=generator)
        return Encoded(torch.cat([seen, text]), labels, pixels)


def main(
    folder: Path, kill_after: int, mode: str = "single", optimizer_name: str = "AdamW", dtype: str = "float32"
) -> None:
    """Train 8 steps of 4 items."""
    if mode != "single":
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if mode != "single" else (0, 1)
    torch.manual_seed(0)
    model = build_model(SHAPE)
    if mode == "single" and optimizer_name == "AdamW":
        train_adapter(model, rank=2, dropout=0.1, trains_projector=True)
    else:
        train_parts(model, ["llm", "vision_tower", "mm_projector"])
    network = learner(model, mode)
    items: Any = RandomItems(model.tokens_per_image)
    sampler = StepBatches(items, 4, passes=2, rank=rank, world_size=world, replica_count=2)
    optimizer = getattr(torch.optim, optimizer_name)(trained_parameters(network), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(sampler))
    state = RunState(folder / "state", network, optimizer, scheduler, sampler, interval=1)
    trainer = StageTrainer(
        "cpu",
        2,
        make_loader(items, sampler, StepCollator(2, 40)),
        network,
        optimizer,
        epoch_length=sampler.steps_per_pass,
        average=WeightAverage(network),
        amp_dtype=dtype,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
    state.attach(trainer)
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output[0]["loss"]))
    if kill_after:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=kill_after), lambda: _end(mode))  # behind the saving
    trainer.run()
    print("scale", trainer.grad_scaler.state_dict())
    weights = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        weights["losses"] = torch.tensor(losses, dtype=torch.float64)
        if mode == "single" and not kill_after and optimizer_name == "AdamW":
            weights.pop("losses")
        torch.save(weights, folder / "end.pt")
    if mode != "single":
        dist.destroy_process_group()


def _end(mode: str) -> None:
    if mode == "single":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
