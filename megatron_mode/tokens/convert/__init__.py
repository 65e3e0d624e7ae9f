"""Turn the dialogue formats of others into the messages of `documents`, without losing a word.

    one record -> {"messages": [{"role", "content", "tool_calls"?}], "tools"?}

`turns` holds the rules that all formats share; `sharegpt`, `openai`, `function_call` and
`agent_log` read one format each; `record` reads files and gives every dialogue its id and source.
"""
