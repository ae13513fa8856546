"""Build of the optional native parts. Metadata lives in pyproject.toml."""

from setuptools import setup

setup()
