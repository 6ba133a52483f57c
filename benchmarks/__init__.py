"""Benchmarks anyone can run: ``python -m benchmarks.NAME [--quick] [--json FILE] [--plot FILE.png]``, from a checkout.

``README.rst`` beside this file says how to run and read them, and how to add a peer.
"""
