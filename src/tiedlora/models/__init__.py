"""Base models: loading, identity, the embedded and the random models, attention, the device.

This package knows neither tasks nor training. It may import adapter (architectures, linear), records, config and the
modules at the top of the package. models.identity imports no torch, so finished runs can be checked quickly.
"""
