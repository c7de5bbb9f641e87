"""A draft model that drafts for one call after the other, in another process than the engine's."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from transformers import PreTrainedModel

from ...cache import PagedPrefixCache
from ...decoding.calibration import Calibration
from ...decoding.drafting import Drafter
from ...decoding.proposal import Proposer
from ...model_devices import input_device
from ..draft_loop import run_draft_loop
from ..graphs.compiled import num_compilations
from ..graphs.lane_graphs import LaneGraphs
from ..memory import num_blocks
from ..ranks.lane import new_cache, new_lane
from ..streams import LaneStream
from . import records
from .draft_boxes import Inbox, Outbox, ToldToQuit
from .processor_specs import decode_processors
from .records import BeginCall, Clear, Quit
from .shared_distributions import SharedDistributions


class DraftServer:
    """The draft model with its cache and its calibration, which live from call to call.

    Parameters
    ----------
    outbox : callable
        Makes the `Outbox` of a call.
    distributions : int or None
        The file of `SharedDistributions`; None where no call may ask for them.
    """

    def __init__(
        self, model: PreTrainedModel, inbox: Inbox, outbox: Callable[[int], Outbox], distributions: int | None
    ) -> None:
        self.model, self.inbox, self._outbox, self._distributions = model, inbox, outbox, distributions
        self.calibration = Calibration()
        self.cache: PagedPrefixCache | None = None
        self._made_for: tuple[int, bool] | None = None
        self._graphs = LaneGraphs()

    def progress(self) -> int:
        """Layers computed, looks for a message, and pieces of a model compiled."""
        cache = self.cache
        return self.inbox.num_looks + num_compilations() + (0 if cache is None else cache.statistics.computed_layers)

    def serve(self) -> None:
        """Serve calls until told to quit."""
        while True:
            message = self.inbox.message(block=True)
            if isinstance(message, Quit):
                return
            if isinstance(message, Clear) and self.cache is not None:
                self.cache.reset_pools()
            elif isinstance(message, BeginCall):
                self._serve_call(message)
            # Anything else belongs to a call that has failed here, and whose end the engine has not seen yet.

    def _serve_call(self, begin: BeginCall) -> None:
        outbox = self._outbox(begin.number)
        options, distributions = begin.options, None
        if options.keeps_distributions:
            assert self._distributions is not None
            file = self._distributions
            distributions = SharedDistributions(file, begin.number, options.vocab_size, options.max_line)
        try:
            self._draft(options, distributions, outbox)
        except (ToldToQuit, records.MalformedRecordError):
            raise
        except Exception:
            self.cache = None  # Whatever failed may have left its books half written.
            self._graphs.forget("draft")
            outbox.fail(traceback.format_exc())
        finally:
            if distributions is not None:
                distributions.clear()

    def _draft(self, options: records.CallOptions, distributions: SharedDistributions | None, outbox: Outbox) -> None:
        cache = self._cache_for(options)
        graphs = None
        if options.captures:
            graphs = self._graphs.runner("draft", self.model, cache, options.compiles)
        lane = new_lane(self.model, cache, options.prefix_cache, options.cache_salt, graphs, "draft")
        processors = decode_processors(options.processors)
        proposer = Proposer(options.vocab_size, processors, options.pad_token_id, distributions)
        # How often guesses stand that were drawn apart says nothing of those that share the target's noise.
        calibration = self.calibration if distributions is None else Calibration()
        drafter = Drafter(lane, proposer, calibration, options.max_line, options.free_running, options.max_width)
        with lane.ready(), LaneStream(lane.device, is_urgent=True).running():
            outbox.publish(drafter, [])
            run_draft_loop(drafter, self.inbox, lambda trees: outbox.publish(drafter, trees), options.free_running)
            outbox.publish(drafter, [], is_finished=True)

    def _cache_for(self, options: records.CallOptions) -> PagedPrefixCache:
        made_for = options.num_blocks, options.eight_bit_cache
        if self.cache is None or self._made_for != made_for:
            self.cache, self._made_for = None, made_for
            most = num_blocks(self.model, options.eight_bit_cache, options.num_blocks)
            self.cache = new_cache(self.model, most, eight_bit=options.eight_bit_cache, device=input_device(self.model))
        self.cache.backend.use(options.attention)
        return self.cache
