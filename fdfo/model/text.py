"""Encoded prompts: the text embeddings that the transformer takes (docs/method.md 4 and 5)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TextEmbeddings:
    """Encoded prompts, one a row."""

    tokens: torch.Tensor  # [N, L, D]
    pooled: torch.Tensor | None = None  # [N, D'], if the model takes one
    lengths: torch.Tensor | None = None  # [N] int64 on the CPU: tokens of each prompt; the rest is filling. None: all L

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: torch.Tensor | slice | list[int]) -> "TextEmbeddings":
        pooled = None if self.pooled is None else self.pooled[index]
        if self.lengths is None:
            return TextEmbeddings(self.tokens[index], pooled)
        return TextEmbeddings(self.tokens[index], pooled, self.lengths[index.cpu() if isinstance(index, torch.Tensor) else index])

    def to(self, device: torch.device) -> "TextEmbeddings":
        return TextEmbeddings(self.tokens.to(device), None if self.pooled is None else self.pooled.to(device), self.lengths)

    def own_tokens(self) -> list[torch.Tensor]:
        """Return each prompt's tokens without filling: N times [L_i, D]."""
        return [row[:length] for row, length in zip(self.tokens, self.lengths.tolist(), strict=True)]

    def repeated(self, times: int) -> "TextEmbeddings":
        """Return one row many times, without copying it."""
        pooled = None if self.pooled is None else self.pooled.expand(times, -1)
        lengths = None if self.lengths is None else self.lengths.expand(times)
        return TextEmbeddings(self.tokens.expand(times, -1, -1), pooled, lengths)

    def filled_up(self, rows: int) -> "TextEmbeddings":
        """Repeat the first row until there are `rows`."""
        missing = rows - len(self)
        return self if missing == 0 else joined([self, self.rows(slice(0, 1)).repeated(missing)])

    def lengthened(self, length: int) -> "TextEmbeddings":
        """Return texts with about this many tokens, for a trial, where their number may differ; others stay."""
        if self.lengths is None:
            return self
        times = max(1, length // self.tokens.shape[1])
        return TextEmbeddings(self.tokens.repeat(1, times, 1), self.pooled, self.lengths * times)


def joined(parts: list[TextEmbeddings]) -> TextEmbeddings:
    """Return the rows of all parts, one after the other; texts of unlike lengths are filled with zeros."""
    longest = max(part.tokens.shape[1] for part in parts)
    filled = [part.tokens for part in parts]
    if parts[0].lengths is not None:
        filled = [F.pad(tokens, (0, 0, 0, longest - tokens.shape[1])) for tokens in filled]
    return TextEmbeddings(
        torch.cat(filled),
        None if parts[0].pooled is None else torch.cat([part.pooled for part in parts]),
        None if parts[0].lengths is None else torch.cat([part.lengths for part in parts]),
    )
