"""Containers of weights, each read as data: the bytes of a file to names, shapes and places of tensors."""
