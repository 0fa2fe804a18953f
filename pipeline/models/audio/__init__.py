"""Audio encoders and what they hear."""
