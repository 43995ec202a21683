"""What `python -m lottery_sparse doctor` runs."""
