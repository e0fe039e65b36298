"""Instruction data: records, the sources they come from, their validation and their mixture."""
