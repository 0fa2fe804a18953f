"""SmolVLM2."""
