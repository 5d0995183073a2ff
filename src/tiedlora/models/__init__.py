"""Base models: loading, identity, the embedded and the random models, attention, the device.

This package knows neither tasks nor training. It may import adapter (its architectures), records, config and the
modules below. models.identity imports no torch, so finished runs can be checked quickly.
"""
