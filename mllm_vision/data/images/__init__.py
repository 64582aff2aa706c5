"""Decoding and transforming images, and data sets of images alone."""
