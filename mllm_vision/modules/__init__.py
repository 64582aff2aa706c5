"""Layers of methods: heads, momentum copies, queues, centring, BatchNorm over all ranks."""
