"""Evaluators of generated text: question answering and captions."""
