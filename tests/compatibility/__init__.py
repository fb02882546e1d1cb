"""Runs tests with other releases of torch and writes the results into docs/compatibility.md.

``python -m tests.compatibility 2.15.0 2.11.0`` makes a virtual environment for each release, runs the unit tests there
and records the counts. It needs only the standard library, a C++ compiler and the package registry.
"""
