"""Which tokens are computed when, and where their keys and values live. No tensor is known here."""

from flexmoe.scheduling.block_manager import BlockManager, PrefixStats
from flexmoe.scheduling.data_ranks import DataRanks, JointStep
from flexmoe.scheduling.request import FinishReason, Request, RequestStatus
from flexmoe.scheduling.roofline import StepTokens
from flexmoe.scheduling.scheduler import Scheduler
from flexmoe.scheduling.step import ScheduledChunk, Step

__all__ = [
    "BlockManager",
    "DataRanks",
    "FinishReason",
    "JointStep",
    "PrefixStats",
    "Request",
    "RequestStatus",
    "ScheduledChunk",
    "Scheduler",
    "Step",
    "StepTokens",
]
