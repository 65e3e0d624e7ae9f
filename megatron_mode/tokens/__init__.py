"""Turn text into token ids: the first word of the flow, without torch.

    readers -> documents -> template -> tokenizer -> staging -> shards

`readers` gives any input as JSON lines; `documents` checks them; `converters` turns the formats of
others into such lines, `convert_command` being the verb; `template` renders a document as pieces
and roles; `tokenizer` turns text into ids; `split` decides which documents are held out and which
lose their role markers; `mode_tokens` puts mode tokens in; `staging` shuffles; `shards` writes and
reads prepared sources (`index` is the megatron-core file, `document_table` the ids); `folder` makes
a whole preparation appear at once; `prepare` is the pipeline, `prepare_command` the verb. Design:
the folder DATA_ROOT holds one tokenizer and any number of sources; a source has one mode.
"""
