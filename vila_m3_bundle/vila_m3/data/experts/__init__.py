"""Conversations in which an expert takes part."""

# Modality of the studies -> name of the data set made of them, of its files and of the folder of its pictures.
DATA_SETS = {"CT": "expert_vista3d", "MRI": "expert_brats", "CXR": "expert_cxr"}
