"""Speed of the embedded engine, vLLM, Transformers' continuous batching and ``generate``; what a weight update costs.

    python benchmarks/engines.py --json engines.json              ten minutes on two cores
    python benchmarks/engines.py --smollm2 --json engines.json    half an hour: SmolLM2-135M too
    python benchmarks/engines.py --quick                          does it run? most of the half minute is vLLM's start

The tiny model has random weights in the shape of the embedded one. Every engine gets the same prompts and the same
number of tokens to write for each (no end token is ever sampled), keeps at most ``concurrency`` responses in flight,
samples at T = 1 in float32 and returns log-probs. Lengths are *uniform* (all the same) or *long-tailed* (log-normal,
σ = 1). Only tokens that were asked for count: ``generate`` runs a batch until its longest response ends. All engines
take turns within each repeat; the tables show medians.

Each engine has one torch thread. vLLM's is in a process of its own, whose requests and results a thread of this process
handles beside it; CPU-seconds are those of all its processes. A busy machine disturbs them less than the clock.

Updates: *stands still* is the time without a decode step, *load* the call with the weights in the file that vLLM reads,
*call* with the writing of that file, during which vLLM goes on. *Lost* is by how much longer a run with one update
took, so that keys computed anew and cores taken from generation are in it. ``generate`` takes new weights between two
batches only.
"""

import contextlib
import importlib.util
import json
import logging
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from bench import announce, command_line, environment, parse
from engine_speed.progress import Progress, run_estimate_s
from engine_speed.runners import ENGINES, Setting, kinds_of_update, running
from engine_speed.speeds import SpeedRow, speed_rows
from engine_speed.stalls import StallRow, stall_rows
from engine_speed.tables import claims, speed_table, stall_table
from engine_speed.workloads import LENGTHS, QUICK, SMOLLM2, TINY, Sizes, make_workload, update_workload

from vapo_async.collector.vllm_environment import INSTALL, prepare_vllm
from vapo_async.config import EmbeddedModelConfig, SmolLM2ModelConfig
from vapo_async.models.load import load_policy
from vapo_async.models.pretrain import new_model
from vapo_async.models.smollm2 import ensure_smollm2
from vapo_async.weights.mailbox import published_tensors
