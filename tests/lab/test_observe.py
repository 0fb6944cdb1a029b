"""What a run is watched for: which rows are old, and how far they are from fresh embeddings."""

import pytest
import torch

from data import shuffled, windows
from figures.observe import ageing, last_pulls
from train import Config, Pretraining, load_dataset


@pytest.mark.parametrize("options", [dict(window=0), dict(window=32, visits=4), dict(window=40, visits=3)])
@pytest.mark.parametrize("step", [1, 7, 12, 25])
def test_the_last_pulls_are_those_of_the_training_loop(options, step):
    config = Config(batch_size=16, epochs=5, **options)
    count, done, expected = 100, 0, {}
    for number, images, entering in windows(count, config.rows(count), min(config.visits, 5), config.seed):
        if done >= step:
            break
        expected |= {image: done for image in entering.tolist()}
        for batch in shuffled(images, config.seed, "epoch", number).split(16)[: config.rows(count) // 16]:
            done += 1
            if done <= step:
                expected |= {image: done for image in batch.tolist()}
    last = last_pulls(config, count, step)
    assert {i: s for i, s in enumerate(last.tolist()) if s >= 0} == expected


def run_of(config):
    dataset = load_dataset(config)
    run = Pretraining(config, len(dataset.train), torch.device("cpu"))
    run.encoder.train()
    return run, dataset


def test_rows_that_are_fresh_are_near_and_rows_of_another_network_are_far(tiny):
    config = tiny(window=0)
    run, dataset = run_of(config)
    run.enter(dataset.train, torch.arange(len(dataset.train)))
    weights = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    near = ageing(run, dataset, step=4, views=64, bins=4)
    assert len(near["ageing"]) == 4 and near["ageing"] == sorted(near["ageing"], key=lambda pair: pair[0])
    assert all(torch.equal(weights[name], value) for name, value in run.encoder.state_dict().items())
    mean = sum(cosine for _, cosine in near["ageing"]) / 4
    assert mean == pytest.approx(near["two_views"], abs=0.1)
    run.bank.init_random()
    far = ageing(run, dataset, step=4, views=64, bins=4)
    assert max(cosine for _, cosine in far["ageing"]) < mean / 2 and far["two_views"] == near["two_views"]


def test_in_a_window_the_images_of_the_window_are_looked_at(tiny, monkeypatch):
    config = tiny(window=32, visits=2)
    run, dataset = run_of(config)
    _, images, entering = next(windows(len(dataset.train), 32, 2, config.seed))
    run.enter(dataset.train, entering)
    asked, batches = [], type(dataset.train).batches

    def noted(self, index, *rest):
        asked.append(index)
        return batches(self, index, *rest)

    monkeypatch.setattr(type(dataset.train), "batches", noted)
    ageing(run, dataset, step=1, views=500, bins=2)
    assert sorted(torch.cat(asked).tolist()) == sorted(images.tolist())
