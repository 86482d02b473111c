"""ONNX graphs to networks: a file to nodes, one normal form, blocks, layers and tensors."""
