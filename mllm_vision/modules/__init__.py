"""Layers of methods: heads, projectors, momentum copies, queues, centring, BatchNorm over all ranks."""
