"""Right answers by right reasoning: Pass@K, judges and their noise, behaviours in what was written."""
