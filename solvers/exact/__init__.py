"""Exact search: masks proven to be the best, and how far a search came."""
