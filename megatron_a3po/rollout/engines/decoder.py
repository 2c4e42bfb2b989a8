"""Sampling many sequences at once from one Hugging Face model: continuous batching, one token per row per step.

Synchronous and single-threaded: `add` requests, `step`, collect what finished. It owns the rows, their cache and their
random numbers; it does not own the weights, which `local.py` may change between two steps, saying so by `invalidate`:
then the cache of every unfinished prefix is computed again before the next token, and version labels are exact.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_a3po.rollout.engines.attention_masks import AttentionMasks
from megatron_a3po.rollout.engines.base import Sample, SampleRequest
from megatron_a3po.rollout.engines.random_numbers import sample_uniforms
from megatron_a3po.rollout.engines.row_cache import RowCache
from megatron_a3po.rollout.trajectory import FinishReason

PREFILL_TOKENS = 4096
PADDED_AT_MOST = 1.2
REFILL_SHARE = 8


@dataclass(frozen=True)
class Finished:
    ticket: Hashable
    sample: Sample


class Decoder:
    """Rows 0..num_active-1 are in use. The cache of a row holds all its tokens but the last, which is the next input;
    so a new row and a row whose weights have changed need the same thing, a prefill of `length - 1` tokens."""

    def __init__(self, model: Any, eos_token_ids: Sequence[int], seed: int, max_rows: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.seed = seed
        self.max_rows = max_rows
        self.eos_token_ids = np.array(sorted(eos_token_ids), dtype=np.int32)
        self.num_active = 0
        self._queue: deque[tuple[SampleRequest, Hashable]] = deque()
        self._masks = AttentionMasks(model.config)
        self._cache = RowCache(max_rows)
        self._requests: list[tuple[SampleRequest, Hashable] | None] = [None] * max_rows
        self._length = np.zeros(max_rows, dtype=np.int64)
        self._prompt_length = np.zeros(max_rows, dtype=np.int64)
        self._end = np.zeros(max_rows, dtype=np.int64)
        self._temperature = np.ones(max_rows, dtype=np.float32)
        self._greedy = np.zeros(max_rows, dtype=bool)
        self._cached = np.zeros(max_rows, dtype=bool)
        self._tokens = np.zeros((max_rows, 0), dtype=np.int32)
        self._versions = np.zeros((max_rows, 0), dtype=np.int32)
        self._logps = np.zeros((max_rows, 0), dtype=np.float32)
        self._uniforms = np.zeros((max_rows, 0), dtype=np.float64)

    @property
    def idle(self) -> bool:
        return not self.num_active and not self._queue

    def add(self, request: SampleRequest, ticket: Hashable) -> None:
        """Queue a request; it gets a row as soon as one is free."""
        self._queue.append((request, ticket))

    def invalidate(self) -> None:
        """The weights have changed: nothing in the cache is theirs."""
        self._cached[:] = False

    @torch.inference_mode()
    def step(self, version: int) -> list[Finished]:
        """Sample one token for every row with the model's weights, which are those of `version`."""
        self._fill_rows()
        if not self.num_active:
            return []
        self._prefill()
        tokens, logps = self._sample(self._forward())
        return self._append(tokens, logps, version)

    def abort(self) -> list[Finished]:
        """End every request, also the queued ones, with what it has."""
        finished = [self._finish(row, "abort") for row in range(self.num_active)]
        nothing = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), "abort")
        finished += [Finished(ticket, nothing) for _, ticket in self._queue]
        self.num_active = 0
        self._queue.clear()
        return finished

    def _fill_rows(self) -> None:
        # A prefill costs a forward however small it is: wait for a few free rows unless all that queue find one.
        if self.max_rows - self.num_active < min(len(self._queue), max(1, self.max_rows // REFILL_SHARE)):
            return
        while self._queue and self.num_active < self.max_rows:
            request, ticket = self._queue.popleft()
            row, prompt_length = self.num_active, len(request.prompt_tokens)
            end = prompt_length + request.max_response_tokens
            self._reserve(end)
            self._requests[row] = (request, ticket)
            self._tokens[row, :prompt_length] = request.prompt_tokens
            self._length[row] = self._prompt_length[row] = prompt_length
            self._end[row] = end
            self._temperature[row] = request.temperature
            self._greedy[row] = request.greedy
            self._cached[row] = False
            if not request.greedy:
                self._uniforms[row, prompt_length:end] = sample_uniforms(
                    self.seed, request.prompt_index, request.sample, request.max_response_tokens, request.turn
                )
            self.num_active += 1

    def _prefill(self) -> None:
        rows = np.flatnonzero(~self._cached[: self.num_active])
        self._cached[rows] = True
        rows = rows[self._length[rows] > 1]
        # The samples of one prompt begin with the same prefix: compute it once and copy it.
        first_with: dict[bytes, int] = {}
        first = [
            first_with.setdefault(self._tokens[row, : self._length[row] - 1].tobytes(), row) for row in rows
        ]
        for chunk in self._chunks(np.array(list(first_with.values()), dtype=np.int64)):
            self._prefill_rows(chunk)
        copies = rows != first
        if copies.any():
            self._copy_cache(np.array(first)[copies], rows[copies])

    def _chunks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Rows to prefill together: of similar length, so that little is padded, and not too many tokens."""
        rows = rows[np.argsort(self._length[rows], kind="stable")]
        while len(rows):
            length = self._length[rows] - 1
            fits = (np.arange(1, len(rows) + 1) * length <= PREFILL_TOKENS) & (
                length <= PADDED_AT_MOST * length[0] + 2
            )
            count = max(1, int(fits.sum()))
            yield rows[:count]
            rows = rows[count:]

    def _prefill_rows(self, rows: np.ndarray) -> None:
        width = int(self._length[rows].max()) - 1
        input_ids = torch.from_numpy(self._tokens[rows, :width].astype(np.int64)).to(self.device)
        positions = torch.arange(width, device=self.device)
        # Padding is on the right, where causal attention of the real tokens never looks.
        before = (positions[:, None] - positions)[None, None]
        self._cache.begin_prefill(torch.from_numpy(rows).to(self.device), width)
        self.model.base_model(
            input_ids=input_ids,
            position_ids=positions[None],
            attention_mask=self._masks(before),
            past_key_values=self._cache,
            use_cache=False,
        )

    def _forward(self) -> Tensor:
        """Logits of the next token of every active row, [rows, vocabulary], in the model's precision."""
        n = self.num_active
        last = self._length[:n] - 1
        width = int(last.max()) + 1
        input_ids = torch.from_numpy(self._tokens[np.arange(n), last].astype(np.int64)).to(self.device)
        positions = torch.from_numpy(last).to(self.device)
        before = (positions[:, None] - torch.arange(width, device=self.device))[:, None, None]
        self._cache.begin_decode(positions, width)
        output = self.model(
            input_ids=input_ids[:, None],
            position_ids=positions[:, None],
            attention_mask=self._masks(before),
            past_key_values=self._cache,
            use_cache=False,
        )
        return output.logits[:, 0]

    def _sample(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and their log-probs in fp32 at each row's temperature: the inverse of the cumulative distribution at
        the row's own uniform number, or the most probable token."""
        n = self.num_active
        temperature = torch.from_numpy(self._temperature[:n]).to(self.device)
        logps = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
        greedy = self._greedy[:n]
        if greedy.all():
            tokens = logps.argmax(dim=-1)
        else:
            cumulative = logps.exp().cumsum(dim=-1, dtype=torch.float64)
            uniforms = torch.from_numpy(self._uniforms[np.arange(n), self._length[:n]]).to(self.device)
            tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
            tokens = tokens.clamp_(max=logps.shape[-1] - 1)
            if greedy.any():
                tokens = torch.where(torch.from_numpy(greedy).to(self.device), logps.argmax(dim=-1), tokens)
        return tokens.cpu().numpy(), logps.gather(1, tokens[:, None])[:, 0].cpu().numpy()

    def _append(self, tokens: np.ndarray, logps: np.ndarray, version: int) -> list[Finished]:
        rows = np.arange(self.num_active)
        columns = self._length[rows]
        self._tokens[rows, columns] = tokens
        self._logps[rows, columns] = logps
        self._versions[rows, columns] = version
        self._length[rows] = columns + 1
        stopped = np.isin(tokens, self.eos_token_ids)
        ended = stopped | (self._length[rows] == self._end[rows])
        finished = [
            self._finish(row, "stop" if stopped[row] else "length") for row in np.flatnonzero(ended).tolist()
        ]
        if finished:
            self._compact(~ended)
        return finished

    def _finish(self, row: int, reason: FinishReason) -> Finished:
        request_and_ticket = self._requests[row]
        assert request_and_ticket is not None
        response = slice(self._prompt_length[row], self._length[row])
        sample = Sample(
            self._tokens[row, response].copy(),
            self._logps[row, response].copy(),
            self._versions[row, response].copy(),
            reason,
        )
        return Finished(request_and_ticket[1], sample)

    def _compact(self, alive: np.ndarray) -> None:
        """Move the last living rows into the holes, so that the living rows are the first ones again."""
        num_alive = int(alive.sum())
        targets = np.flatnonzero(~alive[:num_alive])
        sources = num_alive + np.flatnonzero(alive[num_alive:])
        for array in (
            *(self._length, self._prompt_length, self._end, self._temperature, self._greedy, self._cached),
            *(self._tokens, self._versions, self._logps, self._uniforms),
        ):
            array[targets] = array[sources]
        for target, source in zip(targets, sources, strict=True):
            self._requests[target] = self._requests[source]
        self._requests[num_alive : self.num_active] = [None] * (self.num_active - num_alive)
        if len(targets):
            self._copy_cache(sources, targets)
        self.num_active = num_alive

    def _copy_cache(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._cache.copy(torch.from_numpy(sources).to(self.device), torch.from_numpy(targets).to(self.device))

    def _reserve(self, num_columns: int) -> None:
        if num_columns <= self._tokens.shape[1]:
            return
        wider = ((0, 0), (0, num_columns - self._tokens.shape[1]))
        self._tokens = np.pad(self._tokens, wider)
        self._versions = np.pad(self._versions, wider)
        self._logps = np.pad(self._logps, wider)
        self._uniforms = np.pad(self._uniforms, wider)
