"""What Triton kernels share: tiles, sources, products, limits.

Triton kernels run on CUDA devices, and with TRITON_INTERPRET=1 on the CPU, slowly: that is how they
are tested without a GPU.
"""
