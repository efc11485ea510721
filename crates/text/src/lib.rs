//! Text to tokens and back: tokenizer, streaming detokenizer, chat templates, tool-call and reasoning parsers, grammars.
