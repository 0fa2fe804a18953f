"""What is needed to make the demonstration model: artwork, scenes, language, network, training.

Everything here is for building `pipeline/demo`; the package itself never imports it.
"""
