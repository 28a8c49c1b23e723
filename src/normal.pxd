"""Diagonal normal distributions (placeholder)."""
