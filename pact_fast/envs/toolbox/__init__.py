"""toolbox: multi-hop questions over small random worlds, with an expert that may be few, wrong and
roundabout."""

from pact_fast.envs.toolbox.demonstrations import BaseMix, base_records
from pact_fast.envs.toolbox.env import ToolboxEnv
from pact_fast.envs.toolbox.settings import ToolboxSettings

__all__ = ["BaseMix", "ToolboxEnv", "ToolboxSettings", "base_records"]
