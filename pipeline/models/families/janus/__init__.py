"""The Janus-Pro family."""
