"""Weights of any library into networks and back: sources, layouts, adaptation, proof."""
