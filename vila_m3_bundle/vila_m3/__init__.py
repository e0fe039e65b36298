"""The VLM of VILA-M3: model, processor, checkpoints, generation, training."""
