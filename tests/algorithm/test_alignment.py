"""Position t scores token t+1."""

import numpy as np

from megatron_a3po.algorithm.alignment import shift_to_predictions


def test_versions_meet_the_loss_at_the_positions_that_predict_their_tokens():
    versions = np.array([-1, -1, 3, 3, 7], dtype=np.int32)  # P P R1 R2 R3
    trained = shift_to_predictions(versions >= 0, False)
    shifted = shift_to_predictions(versions, -1)
    assert shifted.tolist() == [-1, 3, 3, 7, -1]
    assert trained.tolist() == [False, True, True, True, False]
    assert shifted[trained].tolist() == [3, 3, 7]


def test_every_field_keeps_its_type_and_moves_alike():
    tokens = np.array([11, 12, 13], dtype=np.int64)
    behave_logp = np.array([0.0, -0.5, -1.5], dtype=np.float32)
    assert shift_to_predictions(tokens, 0).tolist() == [12, 13, 0]
    shifted = shift_to_predictions(behave_logp, 0.0)
    assert shifted.tolist() == [-0.5, -1.5, 0.0]
    assert shifted.dtype == np.float32


def test_a_single_token_predicts_nothing():
    assert shift_to_predictions(np.array([5]), -1).tolist() == [-1]
