"""The composite: wires the VLM to the experts, writes what they say, and shows it."""
