"""The DeepSeek-VL2 family."""
