"""Turn the dialogue formats of others into the messages of `documents`, without losing a word.

    one record -> turns -> {"messages": [{"role", "content", "tool_calls"?}], "tools"?}

`formats` names the formats, most of which only map their fields to turns (`tokens.turns`);
`dialogue` checks and writes the turns of all; `convert` reads and writes files.
"""
