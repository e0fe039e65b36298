"""VISTA3D as an expert of VILA-M3: class-prompted segmentation of CT."""
