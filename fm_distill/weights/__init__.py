"""Pretrained weights: files of other libraries into our networks. Imports `models`, `views`."""
