"""Sequences to be learnt from within their context: prompts, processes and their oracles."""
