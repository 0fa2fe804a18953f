"""The engine's own kernels: each file holds a Triton kernel and its torch reference.

The reference is the CPU path and the truth that the kernel is tested against. Knows no model, no
request and no schedule: tensors in, tensors out.
"""
