"""What a reply may be: tools, schemas and grammars, made into masks over the vocabulary."""
