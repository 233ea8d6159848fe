"""A convolutional network as a ``Classifier``. Importing this does not import JAX.

``architecture`` describes the layers, ``network`` defines and trains them, ``dense`` evaluates them
on all positions of a slice at once.
"""

from organfast.models.architecture import ARCHITECTURES, Architecture, architecture

__all__ = ["ARCHITECTURES", "Architecture", "architecture"]
