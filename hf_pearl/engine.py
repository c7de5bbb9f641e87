"""`PearlEngine`: what stays warm for a (target, draft) pair between calls, and how a call is run on it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .cache import PagedPrefixCache
from .cache.backends import choose_kernels
from .cache.sizing import num_blocks_for
from .cache.support import check_supported
from .config import PearlConfig
from .decoding.calibration import Calibration
from .decoding.draft_distributions import LocalDistributions
from .decoding.draft_tree import longest_line
from .decoding.drafting import Drafter
from .decoding.loop import DecodingLoop
from .decoding.messages import Admission
from .decoding.noise import NoiseSource, request_seed
from .decoding.processors import copies_on, draft_processors
from .decoding.proposal import Proposer
from .decoding.rejection import RejectionSampler
from .decoding.request import Request
from .decoding.rules import Rules
from .decoding.schedule import PlainDecoding, Schedule
from .decoding.stats import PearlStats
from .decoding.verification import Verifier
from .fingerprint import Fingerprint, fingerprint
from .interrupts import KeptInterrupts
from .learnt import Learnt, Runner
from .model_devices import input_device
from .parallel.cores import SharedCores, leaving_cores
from .parallel.graphs.lane_graphs import LaneGraphs
from .parallel.inline import InlineDraft
from .parallel.lane import output_vocab_size
from .parallel.memory import cache_needs, cache_share
from .parallel.probe import check_computed
from .parallel.ranks.lane import Lane, assemble_ranks, new_cache, new_lane, num_threads, turns
from .parallel.streams import on_lane_stream
from .parallel.threads import ThreadDraft
from .parallel.workers.draft_workers import DraftWorkers
from .parallel.workers.execution import Execution, for_hooks
from .turns import Turns

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One row of a call: its tokens without padding, and the padding that stood before them."""

    token_ids: tuple[int, ...]
    padding: tuple[int, ...]


class PearlEngine:
    """One pair of models. Holds their caches and what was learnt about them, not the models themselves.

    Calls on one engine take turns.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self.caches: dict[str, PagedPrefixCache] = {}
        self.workers = DraftWorkers()  # They end with the engine, also when it is garbage.
        self.learnt = Learnt()
        self.graphs = LaneGraphs()
        self._fingerprints: dict[str, Fingerprint] = {}
        self._shares: dict[tuple[torch.device, int], int] = {}

    def decode(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        prompts: Sequence[Prompt],
        rules: Rules,
        config: PearlConfig,
        call_seed: int | None,
    ) -> tuple[list[Request], PearlStats]:
        """Decode every prompt to its end.

        Parameters
        ----------
        call_seed : int or None
            Seed of the call's noise; None when greedy.

        Returns
        -------
        tuple
            The requests, in the order of `prompts`, and what happened.
        """
        with self.turns.turn(), turns(target, draft):
            if self.turns.is_running:  # A callback calls: caches and draft are the outer call's.
                return PearlEngine().decode(target, None, prompts, rules, config, call_seed)
            started = time.perf_counter()
            self._prepare_caches(target, draft, config)
            self.workers.share_cores(config, target, draft, self._fingerprints.get("draft"))
            stats = PearlStats(prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts))
            cache = self.caches["target"]
            num_evicted, num_warm_ups = cache.statistics.evicted_blocks, self.graphs.num_warm_ups
            requests = self._requests(target, prompts, rules, call_seed)
            target_lane = self._lane("target", target, config)
            with (
                KeptInterrupts() as interrupts,
                self.turns.call(),
                self._sound_caches(),
                target_lane.ready(),
                on_lane_stream(target_lane.device),
                leaving_cores(num_threads(target)) as cores,
                self._draft(target, draft, requests, rules, config, stats, cores, interrupts) as (runner, schedule),
                interrupts.let_through(),
            ):
                rejects = rules.do_sample and config.verification == "rejection"
                sampler = RejectionSampler(requests, target_lane.device) if rejects else None
                verifier = Verifier(requests, rules, target_lane.device, sampler)
                loop = DecodingLoop(target_lane, requests, verifier, schedule, runner, stats)
                loop.run()
                if runner is not None:
                    self._report(runner, stats)
                    self.learnt.warn_if_the_draft_rests()
            stats.evicted_blocks = cache.statistics.evicted_blocks - num_evicted
            stats.cached_blocks = cache.pool.num_cached
            stats.warm_up_steps = self.graphs.num_warm_ups - num_warm_ups
            stats.target_seconds = sum(each.ended - each.started for each in stats.target_timeline)
            stats.total_seconds = time.perf_counter() - started
            return requests, stats

    @contextmanager
    def _sound_caches(self) -> Iterator[None]:
        """Begin the caches anew after what may have come while blocks changed hands."""
        try:
            yield
        except (KeyboardInterrupt, MemoryError):
            for cache in self.caches.values():
                cache.start_anew()
            raise

    def clear(self) -> None:
        """Forget every cached prefix, as soon as no call is running."""
        with self.turns.between_calls("`clear_cache`"):
            for cache in self.caches.values():
                cache.clear()
            self.workers.clear()

    def close(self) -> None:
        """Give caches and worker back, as soon as no call is running; the next call begins cold."""
        with self.turns.between_calls("`release`"):
            self.workers.close()
            self.graphs.release()
            self.caches.clear()
            self._fingerprints.clear()

    def begin_anew(self) -> None:
        """Forget the measurements, too: a model moves to other devices."""
        with self.turns.between_calls("A move to other devices"):
            self.close()
            self._shares.clear()
            self.learnt = Learnt()

    def _requests(
        self, target: PreTrainedModel, prompts: Sequence[Prompt], rules: Rules, call_seed: int | None
    ) -> list[Request]:
        device, vocab_size = input_device(target), output_vocab_size(target)
        seeds = [None if call_seed is None else request_seed(call_seed, row) for row in range(len(prompts))]
        return [
            Request(
                request_id=row,
                num_prompt_tokens=len(prompt.token_ids),
                padding=prompt.padding,
                # A criterion that the prompt fulfils ends it behind its first token, as in `generate`.
                max_length=max(rules.max_length - len(prompt.padding), len(prompt.token_ids) + 1),
                verified=list(prompt.token_ids),
                seed=seed,
                noise=None if seed is None else NoiseSource(seed, vocab_size, device),
            )
            for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def _lane(self, name: str, model: PreTrainedModel, config: PearlConfig) -> Lane:
        cache = self.caches[name]
        graphs = self.graphs.runner(name, model, cache, config.compile) if config.captures else None
        return new_lane(model, cache, config.prefix_cache, config.cache_salt, graphs, name)

    @contextmanager
    def _draft(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None,
        requests: Sequence[Request],
        rules: Rules,
        config: PearlConfig,
        stats: PearlStats,
        cores: SharedCores,
        interrupts: KeptInterrupts,
    ) -> Iterator[tuple[Runner | None, Schedule]]:
        """The draft lane of a call, with every request admitted, and its schedule; ended in whatever state it is."""
        execution = None
        if draft is not None:
            num_blocks = self.caches["draft"].pool.max_blocks
            execution = self.workers.choose(config, draft, self._fingerprints["draft"], num_blocks)
        if draft is None or execution is None:
            yield None, PlainDecoding()
            return
        stats.execution = execution = for_hooks(execution, config, target, draft)
        stats.draft_cores = self.workers.worker.num_cores if execution == "processes" and self.workers.worker else 0
        cores.leave(stats.draft_cores)
        runner = self._runner(execution, draft, output_vocab_size(target), rules, config, interrupts)
        try:
            schedule = self.learnt.schedule(runner, cores, config, requests)  # first: it may want the draft to rest
            self._admit(runner, draft, requests)
            yield runner, schedule
        finally:
            runner.abort()
            if isinstance(runner, ThreadDraft) and runner.error is not None:
                del self.caches["draft"]  # Its books may be half written, and the thread may still run.
                self.graphs.forget("draft")

    def _runner(
        self,
        execution: Execution,
        draft: PreTrainedModel,
        vocab_size: int,
        rules: Rules,
        config: PearlConfig,
        interrupts: KeptInterrupts,
    ) -> Runner:
        processors, pad_token_id = draft_processors(rules.processors), rules.pad_token_id or 0
        pad_token_id = pad_token_id if 0 <= pad_token_id < vocab_size else 0  # Some configurations say -1: not padded.
        left_out = sorted({type(each).__name__ for each in rules.processors if each not in processors})
        if left_out:
            logger.info_once(
                f"The draft guesses without {', '.join(left_out)}, which may keep state: acceptance may fall, the "
                "output is the same."
            )
        free_running = config.draft_length == "auto" and config.overlap
        if execution == "processes" and self.workers.worker is not None:
            return self.workers.worker.call(vocab_size, processors, pad_token_id, free_running, config)
        lane = self._lane("draft", draft, config)
        max_line = longest_line(config.draft_length)
        distributions = LocalDistributions(max_line) if config.verification == "rejection" else None
        proposer = Proposer(vocab_size, copies_on(lane.device, processors), pad_token_id, distributions)
        # How often guesses stand that were drawn apart says nothing of those that share the target's noise.
        calibration = self.learnt.calibration if distributions is None else Calibration()
        # Lanes that take turns have no time for guesses beside the likeliest line.
        max_width = 1 if execution == "inline" else config.max_draft_width
        drafter = Drafter(lane, proposer, calibration, max_line, free_running, max_width)
        if execution == "inline":
            return InlineDraft(drafter, lane)
        return ThreadDraft(drafter, lane, free_running, lambda: interrupts.has_come)

    @staticmethod
    def _admit(runner: Runner, draft: PreTrainedModel, requests: Sequence[Request]) -> None:
        longest = getattr(draft.config.get_text_config(), "max_position_embeddings", None) or 2**31
        for each in requests:
            length = min(each.max_length, longest)
            runner.send(Admission(each.request_id, tuple(each.verified), length, each.num_padding, each.seed))

    @staticmethod
    def _report(runner: Runner, stats: PearlStats) -> None:
        stats.add_draft(runner.finish())
        if runner.error is not None:
            logger.warning(
                f"The draft lane failed, and the call went on without it: {type(runner.error).__name__}: {runner.error}"
            )

    def _share(self, device: torch.device, models: Sequence[PreTrainedModel]) -> int:
        """What caches may take on a device: found once, so that it stays the same while they fill."""
        key = device, len(models)
        if key not in self._shares:
            self._shares[key] = cache_share(device, models)
        return self._shares[key]

    def _prepare_caches(self, target: PreTrainedModel, draft: PreTrainedModel | None, config: PearlConfig) -> None:
        """Make the caches that are missing, and clear those whose model has changed since the last call."""
        models = {"target": target} if draft is None else {"target": target, "draft": draft}
        prints = {name: fingerprint(model, self._fingerprints.get(name)) for name, model in models.items()}
        for name, model in models.items():
            check_supported(model)
            assemble_ranks(model, prints[name])
            check_computed(model)
        needs = [need for model in models.values() for need in cache_needs(model, config.eight_bit_cache)]
        for each in needs:
            choose_kernels(config.attention, each.held)  # Refused now, not in the first forward.
        num_blocks = num_blocks_for(needs, config.cache_bytes, lambda device: self._share(device, [*models.values()]))
        for name, model in models.items():
            cache, now = self.caches.get(name), prints[name]
            made_for = input_device(model), num_blocks, config.eight_bit_cache
            if cache is None or (cache.device, cache.pool.max_blocks, cache.eight_bit) != made_for:
                self.caches[name] = new_cache(model, num_blocks, eight_bit=made_for[2], device=made_for[0])
            elif now != self._fingerprints.get(name):
                cache.reset_pools()
                self.learnt.forget_benefits()
            self._fingerprints[name] = now
            self.caches[name].backend.use(config.attention)
