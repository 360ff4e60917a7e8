"""Networks for small images, registered with timm, and one way to build any model by name."""

from softlabels.models import zoo as zoo
from softlabels.models.build import InputSpec, build_model, model_input, model_metadata
from softlabels.models.record import FileRecord

__all__ = ["FileRecord", "InputSpec", "build_model", "model_input", "model_metadata"]
