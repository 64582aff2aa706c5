"""Scenes, the embedded generator of images with captions, questions and answers."""
