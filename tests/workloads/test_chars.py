"""The character transformer and its pieces of text."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.workloads.chars import CONTEXT, CharDataset, CharTransformer, chars_job
from tests.workloads.test_jobs import CPU


@given(text=st.text(min_size=CONTEXT + 1, max_size=4 * CONTEXT))
@settings(deadline=None)
def test_pieces_lie_end_to_end_and_targets_are_one_character_on(text: str) -> None:
    dataset = CharDataset(text)
    chars = list(dataset.char_to_idx)
    pieces = [dataset[index] for index in range(len(dataset))]
    read = "".join(chars[idx] for inputs, _ in pieces for idx in inputs.tolist())
    continued = "".join(chars[idx] for _, targets in pieces for idx in targets.tolist())
    assert read == text[: len(read)]
    assert continued == text[1 : len(read) + 1]
    assert 0 <= len(text) - 1 - len(read) < CONTEXT


def test_resident_rows_are_the_datasets(data_dir: object) -> None:
    job = chars_job(CPU)
    dataset = job.dataset()
    for index in (0, 1, job.num_rows // 2, job.num_rows - 1):
        inputs, targets = dataset[index]
        assert torch.equal(inputs, job.inputs[index])
        assert torch.equal(targets, job.targets[index])


def test_no_logit_knows_a_later_character() -> None:
    torch.manual_seed(0)
    model = CharTransformer(11).double()
    ids = torch.randint(0, 11, (2, CONTEXT))
    changed = ids.clone()
    changed[:, 40] = (ids[:, 40] + 1) % 11
    before, after = model(ids), model(changed)
    assert before.shape == (2, 11, CONTEXT)
    torch.testing.assert_close(after[..., :40], before[..., :40], rtol=0, atol=1e-12)
    assert (after[..., 40:] - before[..., 40:]).abs().amax(dim=(0, 1)).min() > 1e-6


def test_one_matrix_is_both_embeddings() -> None:
    model = CharTransformer(11)
    assert [name for name, weight in model.named_parameters() if 11 in weight.shape] == ["embedding.weight"]
