"""The checks of `python -m lottery_sparse doctor`."""
