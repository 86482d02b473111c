"""Pictures to batches: sources, decoding, augmentation, order, loading."""
