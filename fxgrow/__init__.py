"""fxgrow: a torch.fx growth compiler. Grow neural networks while they train, exactly.

program = fxgrow.capture(model, args)
growth = fxgrow.grow(model, spec, args)
optimizer = growth.carry(optimizer)
"""

from pathlib import Path as _Path

# In a checkout, passes and kernels stand beside this folder and not in it. A wheel that is imported in the repository's
# root finds this folder first.
if not _Path(__file__).with_name("passes").is_dir():
    if not (_Path(__file__).parents[1] / "passes" / "base.py").is_file():
        raise ImportError(f"{_Path(__file__).parent} is fxgrow without its passes and kernels; install the whole of it")
    __path__.append(str(_Path(__file__).parents[1]))

from fxgrow.lazy import attach as _attach
from fxgrow.saved import when_torch_is_there as _when_torch_is_there
from fxgrow.version import __version__ as __version__

# The public names stand in __init__.pyi and load on first use; fxgrow.lazy says why.
__getattr__, __dir__, __all__ = _attach(__name__, __file__)

_when_torch_is_there()
