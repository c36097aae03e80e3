"""transformers' Trainer as it is: its order of passes, evaluations in between, accumulation, logs and checkpoints."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from toy import moving

import lwkd
from lwkd.signals import Hessian, Jacobian

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lwkd.integrations.transformers import DistillationTrainer, LayerwiseRatesCallback  # noqa: E402

STEPS = 4
ROWS = 4


def bert(layers: int, width: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def nets() -> tuple[nn.Module, nn.Module, lwkd.Pairing]:
    torch.manual_seed(0)
    student, teacher = bert(2, 8), bert(4, 16).eval()
    return student, teacher, lwkd.pair(student, teacher, {"input_ids": torch.ones(1, 6, dtype=torch.long)})


def sentences(count: int = STEPS * ROWS) -> list[dict[str, Tensor]]:
    """Of different lengths: what is behind their end is padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        mask = (torch.arange(6) < 3 + number % 4).long()
        ids = torch.randint(1, 30, (6,), generator=generator) * mask
        found.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % 3)})
    return found


def options(folder: Any, **more: Any) -> Any:
    plain: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    known = transformers.TrainingArguments.__dataclass_fields__
    return transformers.TrainingArguments(folder, **{k: v for k, v in (plain | more).items() if k in known})


class InOrder(DistillationTrainer):
    """Batches come as they are listed."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def base(student: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=0.01)


CLIPPED: dict[str, Any] = {"max_grad_norm": 0.1, "lr_scheduler_type": "linear", "warmup_steps": 1}


def run(folder: Any, form: str, *, resume: Any = None, **more: Any) -> tuple[Any, Any, Any]:
    """The trained student, what shows the rates, and the trainer."""
    student, teacher, pairing = nets()
    callback = (
        LayerwiseRatesCallback(pairing, teacher, policy=moving()) if form == "callback" else LayerwiseRatesCallback()
    )
    optimizer = base(student)
    if form == "wrapper":
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, policy=moving())
    trainer = InOrder(
        student,
        options(folder, **more),
        train_dataset=sentences(),
        eval_dataset=sentences(ROWS),
        teacher=teacher,
        temperature=2.0,
        alpha=0.5,
        optimizers=(optimizer, None),
    )
    callback.add_to(trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rates per layer.*")
        trainer.train(resume_from_checkpoint=resume)
    return student, callback.shown, trainer


def by_hand(passes: int, *, clipped: bool = False) -> tuple[nn.Module, Any]:
    """The student and the optimizer of a plain loop; ``clipped`` has the clipping and the schedule of ``CLIPPED``."""
    student, teacher, pairing = nets()
    optimizer = lwkd.LayerwiseOptimizer(base(student), student, teacher, pairing, policy=moving())
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 1, STEPS) if clipped else None
    student.train()
    rows = ROWS // passes
    batches = [sentences()[i : i + rows] for i in range(0, STEPS * ROWS, rows)]
    for number, listed in enumerate(batches):
        batch = {key: torch.stack([one[key] for one in listed]) for key in listed[0]}
        labels = batch.pop("labels")
        logits = student(**batch).logits
        with torch.no_grad():
            target = F.log_softmax(teacher(**batch).logits / 2.0, dim=-1)
        soft = F.kl_div(F.log_softmax(logits / 2.0, dim=-1), target, reduction="batchmean", log_target=True)
        ((0.5 * F.cross_entropy(logits, labels) + 0.5 * 4.0 * soft) / passes).backward()
        if (number + 1) % passes:
            continue
        if clipped:
            norm = nn.utils.clip_grad_norm_(student.parameters(), CLIPPED["max_grad_norm"])
            assert norm > CLIPPED["max_grad_norm"], "this test cannot fail"
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return student, optimizer


@pytest.mark.parametrize("form", ["callback", "wrapper"])
@pytest.mark.parametrize(("passes", "clipped"), [(1, False), (2, False), (2, True)])
def test_updates_are_those_of_a_plain_loop(form: str, passes: int, clipped: bool, tmp_path: Path) -> None:
    expected, optimizer = by_hand(passes, clipped=clipped)
    more: dict[str, Any] = {"per_device_train_batch_size": ROWS // passes, "gradient_accumulation_steps": passes}
    more |= CLIPPED if clipped else {}
    student, shown, trainer = run(tmp_path, form, eval_strategy="steps", eval_steps=1, **more)
    assert trainer.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == (0.0 if clipped else 0.01)
    assert shown.measurements == STEPS
    assert shown.rates == pytest.approx(optimizer.rates, rel=1e-4)
    assert len(set(shown.rates.values())) == 2
    for mine, theirs in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-3, atol=1e-5)


def _rank(rank: int, folder: str) -> dict[str, list[Any]]:
    """Measurements, rates and parameters on this rank, in each form."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(number) for name, number in told.items()})
    found = {}
    for form in ("callback", "wrapper"):
        more = {"per_device_train_batch_size": ROWS // 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
        student, shown, trainer = run(f"{folder}/{form}", form, **more)
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        found[form] = [shown.measurements, shown.rates, [p.detach() for p in student.parameters()]]
    return found


def test_two_ranks_do_what_one_does_on_their_rows_together(tmp_path: Path) -> None:
    """All rows of a batch have the same weight in its gradient and its divergences, whichever rank they are on."""
    expected, optimizer = by_hand(1)
    for found in on_ranks(_rank, tmp_path, str(tmp_path)):
        for measurements, rates, parameters in found.values():
            assert measurements == STEPS
            assert rates == pytest.approx(optimizer.rates, rel=1e-4)
            for mine, theirs in zip(parameters, expected.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", ["callback", "wrapper"])
def test_its_checkpoint_continues_bitwise(form: str, tmp_path: Path) -> None:
    whole, shown, _ = run(tmp_path / "whole", form)
    half, _, _ = run(tmp_path / "parts", form, save_strategy="steps", save_steps=2)
    again, resumed, _ = run(tmp_path / "other", form, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert resumed.measurements == STEPS
    assert resumed.rates == shown.rates
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))
    assert "teacher" not in "".join(half.state_dict())


def test_rates_that_are_missing_at_a_resume_are_said(tmp_path: Path) -> None:
    student, teacher, _ = nets()
    trainer = InOrder(
        student,
        options(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=sentences(),
        teacher=teacher,
        optimizers=(base(student), None),
    )
    trainer.train()
    with pytest.raises(UserWarning, match="without LayerwiseRatesCallback: the rates per layer start anew"):
        run(tmp_path / "other", "callback", resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("form", ["callback", "wrapper"])
def test_rates_divergences_and_update_ratios_are_logged(form: str, tmp_path: Path) -> None:
    _, shown, trainer = run(tmp_path, form)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    names = {f"{kind}/{layer}" for kind in ("rate", "divergence", "update_ratio") for layer in shown.rates}
    assert all(names <= entry.keys() for entry in logged)
    assert {layer: logged[-1][f"rate/{layer}"] for layer in shown.rates} == shown.rates
    assert all(0 < logged[-1][f"update_ratio/{layer}"] < 1 for layer in shown.rates)


def test_tokens_count_where_they_have_a_label_or_are_no_padding() -> None:
    from lwkd.integrations.transformers import _positions

    logits, mask = torch.zeros(1, 3, 5), torch.tensor([[1, 1, 0]])
    labels = torch.tensor([[-100, 2, -100]])
    assert _positions(logits, labels, mask).tolist() == [[False, True, False]]
    assert _positions(logits, torch.tensor([1]), mask).tolist() == [[True, True, False]]
    assert _positions(logits[:, 0], torch.tensor([1]), mask).tolist() == [True]


def test_a_callback_without_a_pairing_needs_an_optimizer_with_rates(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no pairing and teacher.*AdamW.*give the Trainer a LayerwiseOptimizer"):
        run(tmp_path, "nothing")


def bart(layers: int) -> nn.Module:
    sizes = {"d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(
        vocab_size=30, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=16, decoder_ffn_dim=16,
        init_std=0.3, dropout=0.0, forced_eos_token_id=2, **sizes, **tokens,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def t5(layers: int) -> nn.Module:
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_heads": 2, "num_layers": layers}
    config = transformers.T5Config(vocab_size=30, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("model", [bart, t5])
@pytest.mark.parametrize("length", [6, 8])
def test_an_encoder_decoder_teacher_decodes_what_the_student_does(model: Any, length: int, tmp_path: Path) -> None:
    """Its divergence from a copy of it is 0, whatever the length of the labels."""
    torch.manual_seed(0)
    student, teacher = model(2).eval(), model(2)
    teacher.load_state_dict(student.state_dict())
    tokens = {"input_ids": torch.randint(3, 30, (4, 6)), "labels": torch.randint(3, 30, (4, length))}
    trainer = DistillationTrainer(student, options(tmp_path), teacher=teacher, alpha=1.0)
    assert float(trainer.compute_loss(student, dict(tokens))) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.get_input_embeddings().weight.mul_(1.5)
        expected = F.kl_div(
            *((net(**tokens).logits / 2).log_softmax(-1).flatten(0, 1) for net in (student, teacher)),
            reduction="batchmean", log_target=True,
        )  # fmt: skip
    assert float(trainer.compute_loss(student, dict(tokens))) == pytest.approx(4 * float(expected), rel=1e-5)


@pytest.mark.parametrize("form", ["callback", "wrapper"])
def test_a_trainer_of_an_encoder_decoder(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = t5(2), t5(4).eval()
    example = {"input_ids": torch.ones(1, 6, dtype=torch.long), "decoder_input_ids": torch.ones(1, 5, dtype=torch.long)}
    pairing = lwkd.pair(student, teacher, example)
    optimizer = base(student)
    rates = LayerwiseRatesCallback(pairing, teacher, policy=moving())
    if form == "wrapper":
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, policy=moving())
        rates = LayerwiseRatesCallback()
    data = [{**sentence, "labels": sentence["input_ids"][:5]} for sentence in sentences()]
    trainer = DistillationTrainer(
        student, options(tmp_path), train_dataset=data, teacher=teacher, optimizers=(optimizer, None)
    )
    rates.add_to(trainer)
    trainer.train()
    assert rates.shown is not None
    assert rates.shown.measurements == rates.shown.passes["measured"] == STEPS, "also readable after the training"
    assert min(rates.shown.divergences.values()) > 0


def test_the_teachers_term_of_a_causal_model_is_of_the_logits_that_predict_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    student, teacher = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    ids = torch.randint(1, 30, (2, 6))
    labels = ids.clone()
    labels[:, :3] = -100  # a prompt
    trainer = DistillationTrainer(student, options(tmp_path), teacher=teacher, temperature=2.0, alpha=1.0)
    with torch.no_grad():
        found = trainer.compute_loss(student, {"input_ids": ids, "labels": labels})
    with torch.no_grad():
        mine, theirs = (net(ids).logits.double() / 2 for net in (student, teacher))
    kl = 4 * (theirs.softmax(-1) * (theirs.log_softmax(-1) - mine.log_softmax(-1))).sum(-1)
    assert float(found) == pytest.approx(float(kl[:, 2:5].mean()), rel=1e-5)
    assert float(found) != pytest.approx(float(kl[:, 3:].mean()), rel=1e-3)


@pytest.mark.parametrize(("more", "expected"), [({"bf16": True}, torch.bfloat16), ({}, torch.float32)], ids=str)
def test_the_teacher_runs_in_the_precision_of_the_training(
    more: dict[str, bool], expected: torch.dtype, tmp_path: Path
) -> None:
    student, teacher, _ = nets()
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    for name, net in (("student", student), ("teacher", teacher)):
        dense = net.bert.encoder.layer[0].intermediate.dense
        dense.register_forward_hook(lambda *x, name=name: seen[name].add(x[2].dtype))  # type: ignore[misc]
    given = options(tmp_path, max_steps=1, **more)
    DistillationTrainer(student, given, teacher=teacher, train_dataset=sentences(ROWS)).train()
    assert seen == {"student": {expected}, "teacher": {expected}}


def vit(layers: int, width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "image_size": 16, "patch_size": 4}
    config = transformers.ViTConfig(
        num_hidden_layers=layers, num_attention_heads=2, num_labels=3, initializer_range=0.3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager", **sizes,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("form", ["callback", "wrapper"])
@pytest.mark.parametrize("signal", [Jacobian(), Hessian()], ids=lambda signal: signal.name)
def test_training_in_bfloat16_measures_in_float32(form: str, signal: Any, tmp_path: Path) -> None:
    """The divergences are those of nets that no Trainer has seen, with the weights that the update left."""

    def vits() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return vit(2, 8), vit(4, 16).eval()

    student, teacher = vits()
    x = torch.rand(ROWS, 3, 16, 16)
    pairing = lwkd.pair(student, teacher, {"pixel_values": x})
    chosen = {"signal": signal, "every": 1, "policy": moving(signal)}
    optimizer, rates = torch.optim.SGD(student.parameters(), 0.1), LayerwiseRatesCallback(pairing, teacher, **chosen)
    if form == "wrapper":
        optimizer = lwkd.LayerwiseOptimizer(optimizer, student, teacher, pairing, **chosen)
        rates = LayerwiseRatesCallback()
    logits = []
    student.classifier.register_forward_hook(lambda *given: logits.append(given[2].dtype))
    trainer = InOrder(
        student,
        options(tmp_path, max_steps=1, bf16=True),
        train_dataset=[{"pixel_values": picture, "labels": torch.tensor(n % 3)} for n, picture in enumerate(x)],
        teacher=teacher,
        optimizers=(optimizer, None),
    )
    rates.add_to(trainer)
    trainer.train()
    assert logits[0] == torch.bfloat16
    plain = vits()
    assert not all(map(torch.equal, plain[0].state_dict().values(), student.state_dict().values()))
    plain[0].load_state_dict(student.state_dict())
    expected = signal.divergence(signal.measure(*plain, pairing, {"pixel_values": x}))
    assert list(rates.shown.divergences.values()) == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("form", ["callback", "wrapper"])
def test_a_callback_made_anew_from_a_checkpoint_is_refused(form: str, tmp_path: Path) -> None:
    run(tmp_path, form, max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="leave it off"):
        run(tmp_path, form, resume=str(tmp_path / "checkpoint-2"), restore_callback_states_from_checkpoint=True)


def test_ratios_are_of_the_updates_that_are_logged(tmp_path: Path) -> None:
    trainer = run(tmp_path, "callback", logging_steps=2)[2]
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(any(key.startswith("update_ratio/") for key in row) for row in rows)
