"""Pixtral 12B and Large."""
