"""From one form of a model to another, and the masks of whole models."""
