"""The Kimi-VL family."""
