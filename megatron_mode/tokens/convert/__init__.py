"""Turn the dialogue formats of others into the messages of `documents`, without losing a word.

    one record -> turns -> {"messages": [{"role", "content", "tool_calls"?}], "tools"?}

A format maps its fields to turns (`tokens.turns`), which `chats` checks and writes; `convert` reads
and writes files.
"""

from collections.abc import Callable
from typing import Any

from megatron_mode.tokens.convert.agent_log import agent_log
from megatron_mode.tokens.convert.chats import openai, sharegpt
from megatron_mode.tokens.convert.function_call import function_call

FORMATS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sharegpt": sharegpt,
    "openai": openai,
    "function-call": function_call,
    "agent-log": agent_log,
}
