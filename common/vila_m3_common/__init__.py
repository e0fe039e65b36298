"""Contracts and mechanics shared by every bundle of the collection; imports no bundle."""

__version__ = "0.2.0"

import logging as _logging

# MONAI imports transformers, which imports torchao where it is installed, and that says at every start which compiled
# kernels of other machines it does without.
for _name in ("torchao", "torch.utils._pytree"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)
