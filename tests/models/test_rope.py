"""Rotary angles: position axes, sections, and the complaints about configs that say nonsense."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.rope import Rope, RopeConfig, rope_config


def test_equal_axes_are_plain_rope() -> None:
    plain = Rope(RopeConfig(theta=1e4, dim=16), "cpu")
    at = torch.arange(40)
    for interleaved in (False, True):
        config = RopeConfig(theta=1e4, dim=16, sections=(2, 3, 3), interleaved=interleaved)
        cos, sin = Rope(config, "cpu")(at.expand(3, -1))
        torch.testing.assert_close((cos, sin), plain(at[None]))


def test_sections_follow_their_axes() -> None:
    config = RopeConfig(theta=1e4, dim=16, sections=(2, 3, 3))
    assert Rope(config, "cpu").axes.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    config = RopeConfig(theta=1e4, dim=16, sections=(4, 2, 2), interleaved=True)
    assert Rope(config, "cpu").axes.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    config = RopeConfig(theta=1e4, dim=16, sections=(1, 3, 2, 2))
    assert Rope(config, "cpu").axes.tolist() == [0, 1, 1, 1, 2, 2, 0, 0]
    assert config.num_axes == 3


def test_config_keys_old_and_new_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    at = torch.arange(9)[None]
    first, second = (Rope(rope_config(text, 8), "cpu")(at) for text in (old, new))
    torch.testing.assert_close(first, second)


def test_old_keys_go_before_new_ones_and_yarn_may_leave_its_factor_out() -> None:
    text = {"max_position_embeddings": 400, "rope_parameters": {"rope_type": "spiral"}}
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 100}
    first = Rope(rope_config(text | {"rope_scaling": yarn}, 8), "cpu")
    second = Rope(rope_config(text | {"rope_scaling": yarn | {"factor": 4.0}}, 8), "cpu")
    torch.testing.assert_close(first.inv_freq, second.inv_freq)


def test_part_of_a_head_may_turn() -> None:
    text = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    cos, _ = Rope(rope_config(text, 16), "cpu")(torch.arange(3)[None])
    assert cos.shape == (3, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RopeConfig(theta=1e4, dim=16, kind="spiral"), "'spiral' is unknown"),
        (RopeConfig(theta=1e4, dim=16, kind="linear"), "lacks the key 'factor'"),
        (RopeConfig(theta=1e4, dim=16, sections=(2, 2, 2)), "does not add up to 8"),
    ],
)
def test_complaints(config: RopeConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rope(config, "cpu")
