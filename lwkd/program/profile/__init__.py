"""``lwkd profile``: what layer-wise rates add to a distillation step, on any pair of nets."""

from lwkd.program.profile.run import profile
from lwkd.program.profile.settings import TARGETS, ProfileSettings

__all__ = ["TARGETS", "ProfileSettings", "profile"]
