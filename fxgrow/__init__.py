"""fxgrow: a torch.fx growth compiler. Grow neural networks while they train, exactly."""

__version__ = "0.1.0"
