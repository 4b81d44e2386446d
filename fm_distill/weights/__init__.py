"""Pretrained weights: files of other libraries into the variables of our networks, and back."""
