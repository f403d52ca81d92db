"""Expert MLPs of Hugging Face transformers: ``import scattermoe.transformers`` registers ``"scattermoe"`` with its experts interface.

Then ``model.set_experts_implementation("scattermoe")`` and ``from_pretrained(..., experts_implementation="scattermoe")`` run
the experts of every model that takes the interface, on its own parameters. A model that cannot be served says so then and
there, and stays on the implementation that it had.
"""

from .experts import experts_forward
from .rules import broken_rule, check

try:
    from .registration import register
except ImportError as error:
    raise ImportError(
        "scattermoe.transformers needs transformers 5.8 or newer: pip install 'transformers>=5.8'"
    ) from error

__all__ = ["broken_rule", "check", "experts_forward"]

register()
