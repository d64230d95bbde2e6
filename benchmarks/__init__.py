"""Programs that measure; each begins here, before it imports megatron, so nothing of it warns."""

from engine.environment import quiet_libraries

quiet_libraries()
