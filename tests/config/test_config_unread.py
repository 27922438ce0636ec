"""What is said about settings that have no effect."""

import dataclasses

import pytest

from vapo_async.config.algorithm import AlgorithmConfig
from vapo_async.config.load import flatten, load_config
from vapo_async.config.unread import unread, unread_notes


@pytest.mark.parametrize(
    ("line", "keys", "why"),
    [
        ("alpha=0.5 vtrace_rho_cap=2 value_target=vtrace", "", ""),
        ("lmbda=0.9", "lmbda", "length_adaptive=true"),
        ("length_adaptive=false lmbda=0.9 alpha=1", "alpha", "length_adaptive=false"),
        ("importance=dis behaviour_weight_cap=2", "behaviour_weight_cap", "importance=dis"),
        ("importance=naive m2po_threshold=1", "m2po_threshold", "importance=naive"),
        ("importance=m2po clip_high=5 m2po_threshold=1", "clip_high", "importance=m2po"),
        ("mismatch=tis mismatch_high=3 mismatch_low=0", "mismatch_low", "mismatch=tis"),
        ("mismatch_high=3", "mismatch_high", "mismatch=none"),
        ("vtrace_c_cap=2", "vtrace_c_cap", "value_target=lambda_return"),
        ("advantage=group value_pretraining_steps=0 critic_updates=3", "critic_updates", "advantage=group"),
        ("dynamic_sampling_patience=3", "dynamic_sampling_patience", "dynamic_sampling=false"),
    ],
)
def test_config_notes_name_what_has_no_effect(line: str, keys: str, why: str) -> None:
    overrides = [f"algorithm.{setting}" for setting in line.split()]
    expected = [f"algorithm.{key} has no effect with algorithm.{why}" for key in keys.split()]
    assert unread_notes(load_config(overrides), overrides) == expected


@pytest.mark.parametrize("choice", ["ppo", "grpo", "dapo", "vapo", "vapo_small"])
def test_config_unread_names_keys_that_there_are(choice: str) -> None:
    config = load_config([f"algorithm={choice}"])
    assert unread(config).keys() <= flatten(config).keys()
    assert len(unread(config)) < len(dataclasses.fields(AlgorithmConfig))


def test_config_notes_name_the_stragglers_settings_that_wait_does_not_read() -> None:
    overrides = ["buffer.max_drops=3", "buffer.straggler_timeout_s=5"]
    said = unread_notes(load_config(overrides), overrides)
    assert said == [f"{o.partition('=')[0]} has no effect with buffer.on_straggler=wait" for o in overrides]
    assert unread_notes(load_config([*overrides, "buffer.on_straggler=drop"]), overrides) == []
