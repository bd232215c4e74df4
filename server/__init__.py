"""An inference server for Vision Transformers whose speed and accuracy are one dial, `r`."""

__version__ = "0.1.0"
