"""Any other image-text-to-text model that transformers knows."""
