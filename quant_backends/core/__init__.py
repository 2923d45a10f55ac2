"""Specs and errors shared by every room of the core; imports nothing but torch."""
