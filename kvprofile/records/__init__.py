"""Run records: what a benchmark leaves behind, how it is stored, and results of other tools in the same form."""
