"""Distillation: the loss by hand, a teacher that stays as it is, a student that trains as ever."""
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnnas.networks.registry import create_model
from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import generator, seed_everything
from attnnas.data.clips import Clips, to_float
from attnnas.networks.insertion import insert
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.training.distillation import Distillation
from attnnas.training.loop import Trainer, TrainingConfig

SPEC = CellSpec((OperationSpec("spatial", "map-based", "sigmoid"),), inputs=((0,),), width=4)


def flow(video): return to_float(video[:, :2]).diff(dim=2)  # any function of the frames will do


def network(in_channels=3, seed=0, classes=4):
    seed_everything(seed)
    return nn.Sequential(nn.Conv3d(in_channels, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.Dropout(0.5),
                         nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, classes))


def make_clips(count=24):
    video = torch.randint(0, 256, (count, 3, 5, 8, 8), dtype=torch.uint8, generator=generator("distillation"))
    return Clips(video, torch.arange(count) % 4, list("abcd"), fingerprint="distillation")


def trained(loss, seed=3, epochs=3):
    trainer = Trainer(network(seed=seed), make_clips(), TrainingConfig(epochs=epochs, batch_size=8), loss=loss)
    torch.manual_seed(0)
    trainer.fit()
    return trainer


def test_loss_and_gradient_by_hand():
    clips, teacher, student = make_clips(), network(2, seed=1), network(seed=2).eval()
    scores, loss = Distillation(teacher, flow, weight=0.7)(student, clips.video, clips.labels)
    t, f = teacher.eval()(flow(clips.video)), student(to_float(clips.video))
    log_p = f - f.exp().sum(1, keepdim=True).log()
    crossed = -sum(log_p[i, label] for i, label in enumerate(clips.labels)) / len(clips)
    assert scores.equal(f)
    distance = sum((f[i, c] - t[i, c]) ** 2 for i in range(24) for c in range(4)) / (24 * 4)
    torch.testing.assert_close(loss, crossed + 0.7 * distance)
    gradient, = torch.autograd.grad(loss, scores)
    by_hand = (f.softmax(1) - F.one_hot(clips.labels, 4)) / 24 + 0.7 * 2 * (f - t) / (24 * 4)
    torch.testing.assert_close(gradient, by_hand)


def test_scores_are_compared_before_softmax():
    "Scores that differ by a constant give the same probabilities, and are not the same."
    clips, teacher = make_clips(), network(2, seed=1).eval()
    shifted = copy.deepcopy(teacher)
    with torch.no_grad(): shifted[-1].bias += 3
    loss = Distillation(teacher, flow, student_input=flow)
    assert loss.compare(teacher, clips.video)[1] == 0
    torch.testing.assert_close(loss.compare(shifted, clips.video)[1], torch.tensor(9.0))


def test_a_student_that_gives_the_teacher_s_scores_pays_for_its_classes_only():
    clips, teacher = make_clips(), network(2, seed=1)
    imitate = Distillation(teacher, flow, weight=5.0, student_input=flow)
    scores, loss = imitate(copy.deepcopy(teacher).eval(), clips.video, clips.labels)
    assert loss == F.cross_entropy(scores, clips.labels)


@pytest.mark.parametrize("at", ["", "0"])
def test_the_teacher_is_frozen_and_stays_as_it_was(at):
    teacher = network(2 if not at else 3, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    loss = Distillation(teacher, flow if not at else to_float, at=at)
    teacher.train()  # by mistake: its batch norm and dropout must not notice
    trainer = trained(loss)
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    ours = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert ours == {id(p) for p in trainer.model.parameters()} and list(trainer.model.state_dict()) == list(before)
    assert not any(module._forward_hooks for module in (*teacher.modules(), *trainer.model.modules()))


def test_the_student_comes_closer_to_its_teacher():
    teacher, clips = network(2, seed=1), make_clips()
    loss = Distillation(teacher, flow, weight=10.0)
    taught, alone = trained(loss, epochs=12), trained(Distillation(teacher, flow, weight=0.0), epochs=12)
    far, near = (loss.compare(trainer.model.eval(), clips.video)[1] for trainer in (alone, taught))
    assert near < 0.8 * far


def test_without_weight_training_is_the_trainer_s_own_bit_for_bit():
    "If this fails, watching the teacher draws random numbers or disturbs the student."
    plain = Trainer(network(seed=3), make_clips(), TrainingConfig(epochs=3, batch_size=8))
    torch.manual_seed(0)
    history = plain.fit()
    other = trained(Distillation(network(2, seed=1), flow, weight=0.0))
    assert other.history == history
    assert all(a.equal(b) for a, b in zip(plain.model.state_dict().values(), other.model.state_dict().values()))


def test_a_batch_may_carry_its_flow():
    "Five channels: the student reads three of them, the teacher two."
    video = torch.randint(0, 256, (4, 5, 5, 8, 8), dtype=torch.uint8, generator=generator("five"))
    teacher, student = network(2, seed=1), network(seed=2).eval()
    loss = Distillation(teacher, lambda v: to_float(v[:, 3:]), student_input=lambda v: to_float(v[:, :3]))
    scores, distance = loss.compare(student, video)
    expected = F.mse_loss(student(to_float(video[:, :3])), teacher.eval()(to_float(video[:, 3:])))
    assert distance.equal(expected) and scores.shape == (4, 4)


def test_features_of_a_student_with_a_cell():
    teacher, student = create_model("i3d_small", 4, in_channels=2), insert(create_model("s3d_small", 4), SPEC)
    video = torch.randint(0, 256, (2, 3, 5, 16, 16), dtype=torch.uint8, generator=generator("cell"))
    loss = Distillation(teacher, lambda v: to_float(v[:, :2]), at="Mixed_4b")
    _, distance = loss.compare(student, video)
    distance.backward()
    assert student.Mixed_4b.added.zero_norm.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.Mixed_4c.parameters())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.pair, self.head = nn.ReLU(), Pair(), nn.Linear(3, 4)

    def forward(self, x): return self.head(self.pair(self.act(self.act(x)))[0].mean((2, 3, 4)))


class Pair(nn.Module):
    def forward(self, x): return x, x


@pytest.mark.parametrize("student, options, told", [
    (network(classes=3), {}, r"\(2, 3\) and \(2, 4\) as scores"),
    (network(), {"at": "0"}, r"give \(2, 6, 3, 6, 6\) and \(2, 6, 2, 6, 6\) in '0'"),
    (network(), {"at": "conv"}, "Unknown module of Sequential: 'conv'. Known: 0, 1"),
    (Twice(), {"at": "act"}, "'act' of Twice must give one tensor, once"),
    (Twice(), {"at": "pair"}, "'pair' of Twice must give one tensor, once")])
def test_outputs_that_cannot_be_compared(student, options, told):
    clips, loss = make_clips(2), Distillation(network(2), flow, **options)
    with pytest.raises(AttnnasError, match=told): loss(student, clips.video, clips.labels)


def test_a_negative_weight_is_refused():
    with pytest.raises(AttnnasError, match="weight = -1: expected 0 or more"): Distillation(network(2), flow, weight=-1)
