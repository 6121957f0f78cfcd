"""Thresholds and the statistics that turn measurements into PASS, FAIL or INCONCLUSIVE."""
