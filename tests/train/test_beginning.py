"""What a run begins with that starts from a draft of other layers."""

import jax
import numpy as np
import pytest

from s3d_jax.drafters.stored import save_draft
from s3d_jax.errors import ConfigError
from s3d_jax.settings.drafting import DraftConfig
from s3d_jax.settings.training import AdapterConfig, TrainDraftConfig
from s3d_jax.storage import native
from s3d_jax.train.beginning import beginning, vocabulary_of
from tests.tiny import tiny_config, tiny_params
from tests.train.test_objective import noisy_draft

CONFIG = tiny_config()
WIDE = DraftConfig((False, True, True, False), 3)
DEEPER = WIDE.replace(skip=(False, False, True, False), gamma=2)


@pytest.fixture
def model(tmp_path):
    params = tiny_params(CONFIG)
    draft = noisy_draft(CONFIG, params, WIDE, chain_rank=2, recall=1)
    draft = draft.replace(vocabulary=np.arange(0, 31, 3, dtype=np.int32))
    native.save(tmp_path / "model", CONFIG, params)
    save_draft(tmp_path / "model", "wide", WIDE, draft, {})
    return tmp_path / "model", draft


def test_all_but_the_bridges_carries_over(model):
    folder, wide = model
    config = TrainDraftConfig(start="wide", draft=DEEPER, fit_rows=8)
    draft, adapter, start = beginning(folder, CONFIG, config)
    assert draft == DEEPER
    assert adapter == AdapterConfig(rank=3, bridge_rank=5, chain_rank=2, recall=1)  # as it had
    assert set(start.deltas) == {"layers_0", "layers_3"} and start.bridges == {}
    for name in ("mask_embeddings", "deltas", "chain"):
        jax.tree.map(np.testing.assert_array_equal, getattr(start, name), getattr(wide, name))
    found = vocabulary_of(config, start, None, CONFIG.vocab_size)
    np.testing.assert_array_equal(found, wide.vocabulary)


def test_bridges_that_begin_anew_have_any_rank(model):
    config = TrainDraftConfig(start="wide", draft=DEEPER, adapter=AdapterConfig(0, 2, 0, 0))
    assert beginning(model[0], CONFIG, config)[1] == AdapterConfig(3, 2, 2, 1)


@pytest.mark.parametrize(
    ("draft", "changes", "message"),
    [
        (WIDE, dict(fit_rows=8), "leave out fit_rows"),
        (WIDE, dict(adapter=AdapterConfig(0, 2, 0, 0)), "has bridge rank 5, which can grow"),
        (DEEPER, dict(adapter=AdapterConfig(2, 0, 0, 0)), "has rank 3, which can grow"),
        (
            WIDE.replace(skip=(False,) * 4),
            dict(fit_rows=8),
            "without skipped layers there are none",
        ),
        (DEEPER.replace(block_attention="bidirectional"), {}, "only γ and the skip may differ"),
    ],
)
def test_what_does_not_fit_is_refused(model, draft, changes, message):
    with pytest.raises(ConfigError, match=message):
        beginning(model[0], CONFIG, TrainDraftConfig(start="wide", draft=draft, **changes))
