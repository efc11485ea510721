"""Tokenizers from vocabulary files without a tokenizer.json, as mlx-lm reads them.

    python vocabulary_files.py FOLDER

Trains small sentencepiece models of both kinds and small tiktoken vocabularies, writes each with several configurations to a
folder of its own below FOLDER, and prints what the judge makes of them:

    {"models": [{"folder": ..., "judge": "mlx-lm" | "sentencepiece" | "author",
                 "tokens": [the vocabulary, by id], "bos": id or null, "eos": [ids],
                 "texts": [{"text", "plain", "special"}], "ids": [{"ids", "text", "without_special"}]}]}

"author" are the rules of the Python that Kimi's and Qwen's first models bring along; they are told again here, over the
`regex` package, because tiktoken itself is not among the judge's packages.
"""

import base64
import io
import json
import random
import sys
import unicodedata
from pathlib import Path

import regex
import sentencepiece
from mlx_lm.tokenizer_utils import NewlineTokenizer, TokenizerWrapper, load
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral import convert_tekken_tokenizer

RANDOM = random.Random(7)
WORDS = ("the quick brown fox jumps over a lazy dog hello world token model speaks of many things and 123 45 6789 école "
         "naïve straße 日本語 テキスト ﬁne ½ Ａｂｃ don't it's I'll HTTPServer").split()
CORPUS = [" ".join(RANDOM.choice(WORDS) for _ in range(RANDOM.randint(3, 12))) for _ in range(400)]
TEXTS = ["", " ", "the quick brown fox", "  hello   world ", "école naïve ½ ﬁne Ａｂｃ", "line\nbreak\n\n  more", "日本語テキスト 日 本",
         "emoji 😀😀 ü", "a ,b", "<usr>the<ctl>fox <usr> x", "<s>the</s> fox", "</s>", "<new>the<new> <CTL>a", "0123 45 it's I'LL don't",
         "HTTPServer fox日本lazy", "<|im_start|>user\nhi<|im_end|>", "<|extra_3|>the<|reserved_token_290|>", "[BOS]fox[EOS]",
         "\u00a0wide\u2003spaces\ttab", "e\u0301cole", "a<n>b<n\n>", "\u2581already\u2581there", "   ", "<|end|> the <|end|>the"]

SENTENCEPIECE = {
    "bpe": ("bpe", 420, dict(byte_fallback=True, normalization_rule_name="identity", user_defined_symbols=["<usr>", "  "],
                             control_symbols=["<ctl>"], remove_extra_whitespaces=False)),
    "bpe_nmt": ("bpe", 150, dict(normalization_rule_name="nmt_nfkc", control_symbols=["<ctl>"])),
    "unigram_nmt": ("unigram", 200, dict(normalization_rule_name="nmt_nfkc", user_defined_symbols=["<usr>"],
                                         control_symbols=["<ctl>"])),
    "unigram_bytes": ("unigram", 450, dict(byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
                                           remove_extra_whitespaces=False, user_defined_symbols=["<usr>"])),
    "unigram_gemma_ids": ("unigram", 450, dict(byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
                                               bos_piece="<bos>", eos_piece="<eos>")),
}

ADDED = {"0": {"content": "<unk>", "special": True}, "3": {"content": "<CTL>", "special": True},
         "500": {"content": "<|end|>", "special": True}, "501": {"content": "<new>", "special": False, "normalized": False}}
CONFIGURATIONS = {
    "bare": {},
    "llama": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}, "config.json": {"model_type": "llama"}},
    "llama_legacy": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True, "add_bos_token": True}},
    "llama_plain": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "add_eos_token": True}},
    "llama_added": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>", "add_bos_token": True,
                                              "add_eos_token": True, "added_tokens_decoder": ADDED}},
    "phi3": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, "config.json": {"model_type": "phi3"}},
    "gemma": {"tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}},
    "further": {"tokenizer_config.json": {"eos_token": "<|end|>", "additional_special_tokens": ["<new>", "<usr>"]}},
    "older_files": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}, "added_tokens.json": {"<new>": 500, "<|end|>": 501},
                    "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": "<|end|>",
                                                "additional_special_tokens": ["<ctl>"]}},
}


def train(kind, size, options):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=out, model_type=kind, vocab_size=size, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **options)
    return out.getvalue()


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def random_ids(size):
    return [[RANDOM.randrange(size) for _ in range(RANDOM.randint(0, 12))] for _ in range(25)]


def described(folder, judge, tokens, bos, eos, encode, decode):
    texts = [{"text": text, "plain": encode(text, False), "special": encode(text, True)} for text in TEXTS]
    rows = random_ids(len(tokens)) + [row["plain"] for row in texts]
    ids = [{"ids": row, "text": decode(row, False), "without_special": decode(row, True)} for row in rows]
    return {"folder": folder.name, "judge": judge, "tokens": tokens, "bos": bos, "eos": eos, "texts": texts, "ids": ids}


def by_mlx_lm(folder, tokenizer=None):
    tokenizer = tokenizer or load(folder)
    return described(
        folder, "mlx-lm", tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), tokenizer.bos_token_id,
        sorted(tokenizer.eos_token_ids), lambda text, special: tokenizer.encode(text, add_special_tokens=special),
        lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip))


def by_sentencepiece(folder, model):
    """For tokenizers with Python of their own, which hand their text to sentencepiece. Texts with special tokens are theirs."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    plain = [text for text in TEXTS if not any(mark in text for mark in ("<", "\u2581"))]
    texts = [{"text": text, "plain": processor.encode(text), "special": processor.encode(text)} for text in plain]
    tokens = [processor.id_to_piece(at) for at in range(len(processor))]
    ids = [{"ids": row["plain"], "text": processor.decode(row["plain"]), "without_special": processor.decode(row["plain"])}
           for row in texts if processor.unk_id() not in row["plain"]]  # which it shows as a sign of its own
    return {"folder": folder.name, "judge": "sentencepiece", "tokens": tokens, "bos": processor.bos_id(),
            "eos": [processor.eos_id()], "texts": texts, "ids": ids}


def ranks_of_corpus(count):
    """A byte-pair vocabulary: the 256 bytes in an order of their own, then the most frequent pairs."""
    single = [bytes([value]) for value in range(256)]
    RANDOM.shuffle(single)
    ranks = {token: at for at, token in enumerate(single)}
    words = [[bytes([value]) for value in word.encode()] for line in CORPUS for word in regex.findall(r" ?\p{L}+| ?\p{N}+", line)]
    while len(ranks) < count:
        pairs = {}
        for word in words:
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for word in words:
            at = 0
            while at + 1 < len(word):
                if word[at] == left and word[at + 1] == right:
                    word[at:at + 2] = [left + right]
                at += 1
    return ranks


def tiktoken_file(ranks):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def load_tiktoken_bpe(path):
    lines = Path(path).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


# The judge's environment has no tiktoken; this is all that transformers wants of it.
TikTokenConverter.load_tiktoken_bpe = staticmethod(load_tiktoken_bpe)

QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LETTERS = r"[\p{Lt}\p{Lm}\p{Lo}\p{M}%s&&[^\p{Han}]]"
UPPER, LOWER = LETTERS % r"\p{Lu}", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join([r"[\p{Han}]+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDING}", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDING}",
                         r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


def by_author(folder, ranks, pattern, special, prepare, eos):
    pattern = regex.compile(pattern, regex.V1)
    marks = regex.compile("(" + "|".join(regex.escape(text) for text in sorted(special, key=len, reverse=True)) + ")")
    texts_of = {rank: token for token, rank in ranks.items()} | {at: text.encode() for text, at in special.items()}

    def merge(word):
        parts = [bytes([value]) for value in word]
        while word not in ranks:
            pairs = [(ranks[left + right], at) for at, (left, right) in enumerate(zip(parts, parts[1:])) if left + right in ranks]
            if not pairs:
                return [ranks[part] for part in parts]
            _, at = min(pairs)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [ranks[word]]

    def encode(text, _):
        ids = []
        for part in marks.split(prepare(text)):
            if part in special:
                ids.append(special[part])
            else:
                for word in pattern.findall(part):
                    ids.extend(merge(word.encode()))
        return ids

    def decode(ids, skip):
        kept = [at for at in ids if not (skip and at in special.values())]
        return b"".join(texts_of[at] for at in kept).decode(errors="replace")

    # The library writes bytes as visible characters, so only the special ones can be compared by their texts.
    tokens = [texts_of[at].decode() if at >= len(ranks) else None for at in range(len(texts_of))]
    return described(folder, "author", tokens, None, eos, encode, decode)


def visible(token):
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in token)


def byte_pairs(root, ranks):
    """vocab.json and merges.txt, as each class of transformers reads them."""
    vocabulary = {visible(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": len(ranks)}
    merges = ["#version: 0.2"]
    for token in ranks:
        cuts = [(ranks[token[:at]], ranks[token[at:]], at) for at in range(1, len(token))
                if token[:at] in ranks and token[at:] in ranks]
        merges.extend(f"{visible(token[:at])} {visible(token[at:])}" for _, _, at in sorted(cuts)[:1])
    files = {"vocab.json": vocabulary, "merges.txt": ("\n".join(merges) + "\n").encode()}
    added = {str(len(ranks)): {"content": "<|endoftext|>", "special": True}, "300": {"content": "<|im_end|>", "special": True},
             "301": {"content": "<new>", "special": False}}
    for name, (config, model_type) in {
        "gpt2": ({"tokenizer_class": "GPT2Tokenizer"}, None),
        "gpt2_by_kind": (None, "starcoder2"),
        "gpt2_options": ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "add_bos_token": True,
                          "added_tokens_decoder": added}, "gpt2"),
        "gpt2_end": ({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None, "add_eos_token": True,
                      "additional_special_tokens": ["<usr>"]}, None),
        "codegen": ({"tokenizer_class": "CodeGenTokenizer"}, "phi"),
        "neox": ({"tokenizer_class": "GPTNeoXTokenizer"}, "gpt_neox"),
        "neox_by_kind": (None, "olmo"),
        "qwen2": ({"tokenizer_class": "Qwen2Tokenizer"}, "qwen2"),
        "qwen2_by_kind": (None, "qwen3_moe"),
        "qwen2_whatever_it_says": ({"tokenizer_class": "GPT2Tokenizer"}, "qwen2"),
        "qwen2_options": ({"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True, "bos_token": None, "unk_token": None,
                           "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": added}, "qwen3"),
    }.items():
        folder = root / f"pairs-{name}"
        parts = {"tokenizer_config.json": config, "config.json": {"model_type": model_type}}
        write(folder, files | {file: part for file, part in parts.items() if part not in (None, {"model_type": None})})
        yield by_mlx_lm(folder)


def tekken(root, ranks):
    """Mistral's own format. Without a tokenizer_config.json AutoTokenizer leaves its special tokens without names; the names are those
    of transformers' conversion of the file."""
    pattern = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
               r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    names = ["<unk>", "<s>", "</s>", "[INST]", "<pad>", "<usr>"]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
             for token, rank in sorted(ranks.items(), key=lambda entry: entry[1])]
    listed = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    RANDOM.shuffle(listed)
    config = {"pattern": pattern, "num_vocab_tokens": len(vocab), "default_num_special_tokens": 10, "version": "v11"}
    plain = {"config": config, "vocab": vocab, "special_tokens": listed}
    short = {**plain, "config": {**config, "default_vocab_size": 10 + 280}}
    for name, content in {"plain": plain, "short": short}.items():
        folder = root / f"tekken-{name}"
        write(folder, {"tekken.json": content})
        yield by_mlx_lm(folder, TokenizerWrapper(convert_tekken_tokenizer(str(folder / "tekken.json"))))
    folder = root / "tekken-configured"
    write(folder, {"tekken.json": plain, "config.json": {"model_type": "mistral"}, "tokenizer_config.json": {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True,
        "added_tokens_decoder": {"3": {"content": "[INST]", "special": True}, "900": {"content": "<new>", "special": True}}}})
    yield by_mlx_lm(folder)


def main():
    root = Path(sys.argv[1])
    models = []
    for name, (kind, size, options) in SENTENCEPIECE.items():
        model = train(kind, size, options)
        for configuration, files in CONFIGURATIONS.items():
            folder = root / f"{name}-{configuration}"
            write(folder, {"tokenizer.model": model, **files})
            try:
                models.append(by_mlx_lm(folder))
            except ValueError as error:
                assert "tiktoken" in str(error), error  # renames in a unigram model: transformers fails on them
        folder = root / f"{name}-author"
        write(folder, {"tokenizer.model": model, "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}})
        models.append(by_sentencepiece(folder, model))

    # mlx-lm's own class, which takes a tokenizer.json.
    newline = root / "newline-json"
    tokenizer = load(root / "bpe-gemma")._tokenizer
    tokenizer.add_tokens(["<n>"])
    tokenizer.save_pretrained(newline)
    config = json.loads((newline / "tokenizer_config.json").read_text())
    (newline / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "NewlineTokenizer"}))
    # Through AutoTokenizer, transformers 5 would lose the rules of tokenizer.json, because the class has a constructor.
    marked = NewlineTokenizer(tokenizer_file=str(newline / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>")
    models.append(by_mlx_lm(newline, TokenizerWrapper(marked)))

    ranks = ranks_of_corpus(290)
    file = tiktoken_file(ranks)
    names = {"290": {"content": "[BOS]", "special": True}, "291": {"content": "[EOS]", "special": True},
             "294": {"content": "<|im_end|>", "special": True}, "296": {"content": "<new>", "special": False}}
    for name, files in {
        "tiktoken-bare": {"tiktoken.model": file, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}},
        "tiktoken-llama3": {"tokenizer.model": file, "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "[BOS]", "eos_token": "[EOS]", "add_bos_token": True,
            "additional_special_tokens": ["<usr>"], "added_tokens_decoder": names}},
    }.items():
        write(root / name, files)
        models.append(by_mlx_lm(root / name))

    folder = root / "tiktoken-kimi"
    write(folder, {"tiktoken.model": file, "tokenizer_config.json": {
        "tokenizer_class": "TikTokenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "eos_token": "[EOS]", "added_tokens_decoder": {key: {**value, "special": True} for key, value in names.items()}}})
    special = {names.get(str(at), {"content": f"<|reserved_token_{at}|>"})["content"]: at for at in range(290, 290 + 258)}
    models.append(by_author(folder, ranks, KIMI_PATTERN, special, lambda text: text, [291]))

    folder = root / "tiktoken-qwen"
    write(folder, {"qwen.tiktoken": file, "tokenizer_config.json": {
        "tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}})
    special = {text: 290 + at for at, text in enumerate(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{extra}|>" for extra in range(205))])}
    models.append(by_author(folder, ranks, QWEN_PATTERN, special, lambda text: unicodedata.normalize("NFC", text), []))
    models.extend(byte_pairs(root, ranks))
    models.extend(tekken(root, ranks))
    print(json.dumps({"models": models}))


main()
