"""Memory that runs out within a kernel's op or step, as in tests/house/test_out_of_memory.py."""

from test_out_of_memory import (  # noqa: F401
    test_a_product_and_its_gradients,
    test_a_selection,
    test_a_step,
)
