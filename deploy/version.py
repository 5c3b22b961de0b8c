"""The product's version, readable without an installed distribution."""

VERSION = "0.1.0"
