"""Small tokenizers, trained on the spot, of the kinds that put a space before a text or merge across its seams."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is 1+1? Below are candidate answers to the question above, written independently of each other.",
    "Candidate 1: I think it is 2. Candidate 2: the answer is 3. Integrate them into one final answer.",
    "[INST] the question and the answer [/INST] Integrated, they gave this final answer, one more candidate answer",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<turn>", "<end>"]
LLAMA2 = "{{ bos_token }}[INST] {{ messages[-1].content | trim }} [/INST]"  # turns are plain text
MARKED = "{{ bos_token }}{% for m in messages %}<turn>{{ m.content | trim }}<end>{% endfor %}"  # special tokens
KINDS = ["first", "always", "never", "legacy", "unigram", "bytes", "spaced bytes", "merging bytes"]


def _sentencepiece_bpe(tokenizer: Tokenizer) -> None:
    """BPE in which a space is part of a word and unknown characters, a line break among them, are bytes."""
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=SPECIAL, show_progress=False)
    learning = Tokenizer(models.BPE(unk_token="<unk>"))
    learning.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learning.train_from_iterator(CORPUS, trainer)
    vocab = learning.get_vocab()
    # As converted from SentencePiece: what merges is what stands in the vocabulary, the earlier the better.
    merges = [
        (token[:k], token[k:])
        for token, _ in sorted(vocab.items(), key=lambda item: item[1])
        for k in range(1, len(token))
        if token not in SPECIAL and token[:k] in vocab and token[k:] in vocab
    ]
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    tokenizer.model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


@cache
def make_spaced_tokenizer(kind: str, template: str = LLAMA2) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    whole = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if kind in ("first", "always", "never"):
        _sentencepiece_bpe(inner)
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        inner.decoder = whole
    elif kind == "legacy":
        _sentencepiece_bpe(inner)
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = whole
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=["\n"], show_progress=False
        )
        inner.train_from_iterator(CORPUS, trainer)
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        spaces = pre_tokenizers.ByteLevel(add_prefix_space=kind == "spaced bytes")
        if kind == "merging bytes":  # a mark and the line breaks behind it are one word, as for Qwen and Llama 3
            words = Regex(r" ?[^\s\w]+\n*|\s*\n+| ?\w+|\s+")
            spaces = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        inner.pre_tokenizer = spaces
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator([*CORPUS, *["Is it?\n\nBelow. It is:\n2"] * 9], trainer)
        inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
