"""One GPU in one command: parity, steps, inference, a study."""
