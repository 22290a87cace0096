"""Benchmarks: one load over a vLLM engine without budgets, with budgets, and over remote providers.

A plan (``scenario``) is a list of legs. Each leg has an engine of its own (``engines``), is sent the same requests
(``load``, ``asking``), is watched (``kvprofile.instrumentation``) and judged (``verifiers``), and becomes a part of one
run record (``kvprofile.records.record``). ``runner`` goes through the plan and continues where it was stopped. Nothing
here draws anything.
"""
