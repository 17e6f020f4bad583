"""The stages of ``cuda_acceptance.py``, by subject."""
