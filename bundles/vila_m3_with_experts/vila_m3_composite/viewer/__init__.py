"""The experts and the VLM inside MONAI Label, for 3D Slicer and OHIF.

What the tasks do stands in modules that do not import MONAI Label (``models``, ``running``, ``asking``,
``label_maps``, ``training``, ``scoring``); ``tasks`` makes them MONAI Label's tasks, and ``monailabel_app/main.py`` is
the app.
"""
