"""The brain tumour expert: four MRI sequences in, a BraTS label map and its description out."""
