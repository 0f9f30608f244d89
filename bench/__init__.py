"""Benchmarks of :func:`capsule_kernels.fused_routing`: time, memory, scaling, accuracy."""
