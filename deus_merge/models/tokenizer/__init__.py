"""Which token stands at which row: what recipes say of tokenizers, their union, and embeddings in another order.

::

    settings    tokenizer_source and the tokenizer: section, as recipes have them
    files       tokenizers as files; what can be told of them without transformers
    tokenizer   tokenizers as transformers loads them
    union       tokenizer.json of a union, of a part, with more tokens
    build       all of a recipe's tokenizers -> Vocabulary: the output's tokens, and each model's row of each
    rows        Vocabulary -> for each row of a merged tensor, where it comes from
    permuted    a checkpoint whose embeddings and head are read in the output's order
    special     ids of special tokens in config.json and generation_config.json
    chat        chat templates, by name or the most common one
"""
