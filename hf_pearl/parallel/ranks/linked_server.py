"""A draft lane in another rank of the world than the engine: what it does in a call of `generate`."""

from __future__ import annotations

import contextlib
import queue
import threading

import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from ..workers.draft_boxes import Inbox, Outbox, ToldToQuit
from ..workers.draft_server import DraftServer
from ..workers.records import Message, Quit, decode_message
from .collectives import RankError
from .draft_frames import News
from .world import receive_words, send_words

logger = logging.get_logger(__name__)


class _LinkInbox(Inbox):
    """Messages that a thread receives until the engine leaves."""

    def __init__(self, group: dist.ProcessGroup, engine: int) -> None:
        self._queue: queue.SimpleQueue[Message | Exception] = queue.SimpleQueue()
        self._group, self._engine = group, engine
        self.num_looks = 0

    def listen(self) -> threading.Thread:
        thread = threading.Thread(target=self._listen, name="hf_pearl draft link", daemon=True)
        thread.start()
        return thread

    def _listen(self) -> None:
        try:
            message: Message | None = None
            while not isinstance(message, Quit):
                message = decode_message(receive_words(self._engine, self._group))
                self._queue.put(message)
        except Exception as error:
            self._queue.put(error)

    def message(self, block: bool) -> Message | None:
        try:
            message = self._queue.get(block)
        except queue.Empty:
            return None
        if isinstance(message, Exception):
            raise message
        return message


class LinkedServer:
    """Drafts for an engine in the rank `engine` of the world; the model's cache lives from call to call."""

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup, engine: int) -> None:
        self._group, self._engine, self._news = group, engine, News()
        self._inbox = _LinkInbox(group, engine)
        self._server = DraftServer(model, self._inbox, lambda call: Outbox(self._news, self._send, call), None)

    def _send(self) -> None:
        send_words(self._news.take(), self._engine, self._group)

    def serve(self) -> None:
        """Draft until the engine leaves its call of `generate`, or cuts the link; tell it that no more is to come."""
        listener = self._inbox.listen()
        try:
            with contextlib.suppress(ToldToQuit):
                self._server.serve()
            listener.join()
            send_words((), self._engine, self._group)
        except RankError as error:
            logger.warning(f"Rank {self._engine} has given this draft up: {error}")
