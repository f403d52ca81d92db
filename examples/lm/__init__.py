"""The parts of examples/train.py: text, model, training run and pictures of a small byte-level language model."""
