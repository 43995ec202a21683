"""Commands beside the studies: quickstart, speed, tuning."""
