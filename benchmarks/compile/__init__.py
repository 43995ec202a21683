"""What needs no clock: registers, instructions, and what kernels compile to."""
