"""Weights that others published: a catalog, downloads, and the config files beside them."""
