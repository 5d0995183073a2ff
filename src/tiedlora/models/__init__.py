"""Base models: loading and identifying them, the embedded and the random ones, attention, the device.

Knows neither tasks nor training. May import adapter (its architectures), records, config and the modules below.
models.identity is free of torch, so that reports and finished runs can use it.
"""
