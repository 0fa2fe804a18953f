"""MiniCPM-o 2.6."""
