"""RiskPO: risk measures of bundled rewards as advantages (arXiv 2510.00911)."""
