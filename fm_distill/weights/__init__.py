"""Pretrained weights: files of other libraries into our networks and back. Imports `models`."""
