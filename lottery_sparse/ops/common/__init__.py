"""What several ops share: checks, autograd, vmap and autocast, rules of the C++ kernels."""
