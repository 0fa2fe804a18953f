"""One folder a family: `spec.py` without torch, `model.py` with it."""
