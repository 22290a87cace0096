"""Proof on the machine that is to serve: engines with and without the plugin, asked the same, compared.

``procedure`` says in which order; what holds is written down by ``runtime.attestation``.
"""
