"""From a trained network to what runs in production."""
