"""HAPO: what a token's entropy decides at every stage (arXiv 2509.16591)."""
