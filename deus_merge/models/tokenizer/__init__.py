"""Tokenizers: settings in recipes, the union of several, and embeddings in the order of the output's tokens.

::

    settings        tokenizer_source and the tokenizer: section of a recipe
    files           tokenizers as files, and checks that need no transformers
    tokenizer       tokenizers as transformers loads them
    union           tokenizer.json of a union, of a part, with more tokens
    build           all tokenizers of a recipe -> Vocabulary: the output's tokens, and each model's row of each token
    rows            Vocabulary -> the source of each row of a merged tensor
    permuted        a checkpoint whose embeddings and head are read in the output's order
    blocks          the sources of a plan's blocks with their rows in the output's order
    special         ids of special tokens in config.json and generation_config.json
    chat_template   chat templates, by name or the most common one
"""
