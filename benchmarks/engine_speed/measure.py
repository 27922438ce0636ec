"""Speeds and update costs of engines that take turns."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from engine_speed.runners import BASELINE, Runner, UpdatableRunner, UpdateTimes, run
from engine_speed.workloads import LENGTHS, Sizes, Workload, make_workload, update_workload
from torch import Tensor

from vapo_async.config import KVCacheOnUpdate
