"""The text side of the small models: a byte-level BPE tokenizer trained on captions.

Text is brought to NFKC, lower-cased and stripped of white space at both ends; every string has a tokenization. Seven
ids are special, the first three and the last four, and no text can produce them: a "<s>" that a user types is three
harmless characters.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

FIRST_SPECIALS = ("<unk>", "<s>", "</s>")
"""Special tokens with ids 0, 1 and 2."""

LAST_SPECIALS = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
"""Special tokens with the last four ids: where a picture, or a video, starts and ends."""

SPECIALS = FIRST_SPECIALS + LAST_SPECIALS


class TextTokenizer:
    """Text to ids and back.

    Special tokens are entries of the vocabulary that no merge leads to (rather than "added tokens", which the library
    would look for in the text), so the file is safe with any loader.

    Attributes:
        inner: the `tokenizers.Tokenizer` that does the work.
        specials: special token to id.
        unknown, start, end, image_start, image_end, video_start, video_end: the special ids by name.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        size = inner.get_vocab_size()
        ids = (*range(len(FIRST_SPECIALS)), *range(size - len(LAST_SPECIALS), size))
        self.inner = inner
        self.specials = dict(zip(SPECIALS, ids, strict=True))
        for token, expected in self.specials.items():
            if inner.token_to_id(token) != expected:
                raise ValueError(f"TextTokenizer: {token} must have id {expected}, got {inner.token_to_id(token)}")
        if inner.get_added_tokens_decoder():
            raise ValueError("TextTokenizer: the tokenizer must have no added tokens, text could produce them")
        self.unknown, self.start, self.end, *pictures = ids
        self.image_start, self.image_end, self.video_start, self.video_end = pictures
        self._special_ids = frozenset(ids)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special ones included."""
        return self.inner.get_vocab_size()

    def normalize(self, text: str) -> str:
        """The text as the tokenizer sees it, and as `decode` gives it back. Lone surrogates become "?"."""
        return self.inner.normalizer.normalize_str(text.encode("utf-8", "replace").decode())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones; none for a text that is empty or all white space."""
        text = self.normalize(text)
        return self.inner.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids are passed over, bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside of the vocabulary.
        """
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"decode: ids must be 0 to {self.vocab_size - 1}, got {outside[0]}")
        text = self.inner.decode([i for i in ids if i not in self._special_ids], skip_special_tokens=False)
        return text.removeprefix(" ")  # every word carries the space before it, the first one too

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as partial:
            fresh = Path(partial, path.name)
            fresh.write_text(self.inner.to_str(pretty=True) + "\n", encoding="utf-8")
            os.replace(fresh, path)


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1024) -> TextTokenizer:
    """Learn a byte-level BPE from captions. The same captions, in any order, give the same tokenizer.

    Args:
        captions: the texts; none may hold the text of a special token.
        vocab_size: ids in all, at least 263 (256 bytes and 7 special tokens); fewer come out where the captions are too
            few to learn that many merges from.

    Raises ValueError for a vocab_size that is too small or a caption with a special token.
    """
    least = 256 + len(SPECIALS)
    if vocab_size < least:
        raise ValueError(f"train_tokenizer: vocab_size must be at least {least}, got {vocab_size}")
    texts = sorted(captions)
    for text in texts:
        if found := [token for token in SPECIALS if token in text.lower()]:
            raise ValueError(f"train_tokenizer: captions must not hold a special token, got {found[0]} in {text!r}")

    learner = _assemble(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {word: i for i, word in enumerate((*FIRST_SPECIALS, *words, *LAST_SPECIALS))}
    merges = [tuple(pair) for pair in model["merges"]]
    return TextTokenizer(_assemble(models.BPE(vocab=vocab, merges=merges)))


def load(path: str | Path) -> TextTokenizer:
    """Read a tokenizer.json that `TextTokenizer.save` wrote; `path` is the file or the folder that holds it.

    Raises ValueError, one line, for a file that is missing or is not such a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        path /= "tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # the library raises plain Exception for every fault in the text
        raise ValueError(f"{path}: not a tokenizer ({error})") from None
    try:
        return TextTokenizer(inner)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer of this package ({error})") from None


def _assemble(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
