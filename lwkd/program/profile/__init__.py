"""``lwkd profile``: what layer-wise rates add to a distillation step, on any pair of nets."""

from lwkd.program.profile.inputs import TARGETS, ProfileSettings
from lwkd.program.profile.run import profile

__all__ = ["TARGETS", "ProfileSettings", "profile"]
