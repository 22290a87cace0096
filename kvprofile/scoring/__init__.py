"""Scoring: from a loaded checkpoint and tokenised documents to the scores of each KV head."""
