"""Filled by its files; see ARCHITECTURE.md."""
