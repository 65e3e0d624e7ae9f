"""Turn text into token ids: the first word of the flow, without torch.

    read -> documents -> template -> tokenizer -> prepare -> source

`read` gives any input as JSON lines, and `convert` turns dialogues of other formats into such
lines; `documents` checks them; `template` renders a document as pieces and roles; `tokenizer` turns
text into ids; `mode_tokens` inserts mode tokens; `prepare` decides which documents are held out,
shuffles, drops copies and publishes a complete preparation at once; `source` writes and reads
prepared sources. A folder DATA_ROOT holds one tokenizer and any number of sources; a source has
one mode.
"""
