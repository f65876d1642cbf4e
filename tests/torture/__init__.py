"""Proof that nothing is lost and nobody gets in: every step killed, failed and replayed."""
