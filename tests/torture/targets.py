"""All targets, by name."""

from targets_of_data import DATA
from targets_of_models import MODELS
from targets_of_requests import REQUESTS

TARGETS = {**DATA, **MODELS, **REQUESTS}
