"""LLaVA 1.5, 1.6, NeXT and OneVision: one set of parts for three rows of the table."""
