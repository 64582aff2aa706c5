"""Evaluators on labelled images: kNN, linear probe, classifier accuracy."""
