"""The budget file: its model, how budgets are allocated, how it is stored. Imports no torch."""
