"""The weighted sum of the labels' cross-entropy and of the forms that a job asks for."""

from collections.abc import Iterator, Sequence

import torch

from finetune_api.v1alpha1 import DistillationObjective
from finetune_trainer.data.tensors import MicroBatch
from finetune_trainer.model import CausalModel, Outputs
from finetune_trainer.objectives.distillation import response
from finetune_trainer.objectives.distillation.feature import attention_rows, hidden_states, new_projection
from finetune_trainer.objectives.distillation.head import logits_at, score_logits
from finetune_trainer.objectives.distillation.relation import Relations
from finetune_trainer.objectives.distillation.response import Response
from finetune_trainer.objectives.distillation.teacher_cache import Taking, TeacherCache, fill, is_complete, vocabulary_of
from finetune_trainer.objectives.linear_score import Logits, linear_score
from finetune_trainer.objectives.objective import Context, LossSum, Unit
from finetune_trainer.objectives.sft import Sft

Projections = dict[int, torch.nn.Parameter]
"""The feature form's projections, [width of the teacher, width of the student], by the number of the layer pair."""


class Distillation:
    """A student that learns from a teacher. Every part is a mean over labelled tokens, so any split of a batch gives the same gradient.

    Response: from what is kept of the teacher (`cache`), else from the teacher beside the student, else, where the teacher is an endpoint
    whose text has become the labels, from these.
    """

    unit: Unit = "label"

    def __init__(
        self,
        spec: DistillationObjective,
        teacher: CausalModel | None = None,
        cache: TeacherCache | None = None,
        projections: Projections | None = None,
    ) -> None:
        self._spec, self._teacher, self._cache, self._projections = spec, teacher, cache, projections or {}
        form = spec.response
        self._response = None if form is None else Response.named(form.weight, form.divergence, form.temperature)
        self._label_weight = spec.label_weight
        if form is not None and teacher is None and cache is None:
            self._label_weight += form.weight

    @property
    def measured(self) -> Sft:
        """The labels' plain cross-entropy."""
        return Sft()

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The projections of the feature form."""
        return [(f"feature.{number}.projection", parameter) for number, parameter in sorted(self._projections.items())]

    def loss(self, model: CausalModel, batch: MicroBatch) -> LossSum:
        """The sum over the labelled tokens."""
        feature, relation = self._spec.feature, self._spec.relation
        outputs = self._run(model, batch, logits=not model.plain_head)
        taught = None
        if self._teacher is not None:
            with torch.no_grad():
                distribution = self._response is not None and self._cache is None
                taught = self._run(self._teacher, batch, logits=distribution and not self._teacher.plain_head)

        total = self._over_logits(model, outputs, taught, batch)
        if feature is not None and taught is not None:
            total = total + feature.weight * self._feature(outputs, taught, batch)
        if relation is not None and taught is not None:
            total = total + relation.weight * self._relation(outputs, taught, batch)
        return LossSum(total, batch.labels)

    def _run(self, model: CausalModel, batch: MicroBatch, *, logits: bool) -> Outputs:
        """What a model makes of the batch; the layers only where they are compared, or the last one where it would not be there."""
        feature = self._spec.feature
        layers = feature is not None or (self._spec.relation is not None and logits)
        return model.run(batch, logits=logits, layers=layers, attentions=feature is not None and feature.attention)

    def _over_logits(self, model: CausalModel, outputs: Outputs, taught: Outputs | None, batch: MicroBatch) -> torch.Tensor:
        """The labels' part and the response form, in one pass over the logits."""
        positions = batch.label_positions
        scores = []
        if self._label_weight:
            scores.append(response.cross_entropy(self._label_weight, batch.targets.view(-1)[positions]))
        if self._response is not None and self._cache is not None:
            scores.append(response.largest(self._response, self._cache.of(batch.indices, positions.device)))
        elif self._response is not None and self._teacher is not None and taught is not None:
            scores.append(response.whole(self._response, logits_at(self._teacher, taught, positions)))
        if not scores:
            # Nothing, but with a way back: a batch may hold too few for any relation, and workers that hold parts go back together.
            made = outputs.logits if outputs.logits is not None else outputs.last
            assert made is not None  # noqa: S101 - one of the two is there
            return made.flatten(0, 1)[:0].float().sum()
        score = response.together(*scores)
        if outputs.logits is not None:
            return score_logits(outputs.logits.flatten(0, 1)[positions], score)
        hidden = model.before_head(_last(outputs)[positions])
        return linear_score(hidden, model.head.weight, model.head.bias, Logits(model.precision, model.head_cap), score)

    def _feature(self, outputs: Outputs, taught: Outputs, batch: MicroBatch) -> torch.Tensor:
        """The mean over the layer pairs."""
        pairs = layer_pairs(self._spec, len(outputs.layers), len(taught.layers))
        total = torch.zeros((), device=batch.label_positions.device)
        for number, (mine, its) in enumerate(pairs):
            ours, theirs = (each.flatten(0, 1)[batch.label_positions] for each in (outputs.layers[mine], taught.layers[its]))
            total = total + hidden_states(ours, theirs, self._projections.get(number))
            if outputs.attentions:
                total = total + attention_rows(
                    *(_map_rows(maps, batch) for maps in (outputs.attentions[mine - 1], taught.attentions[its - 1]))
                )
        return total / len(pairs)

    def _relation(self, outputs: Outputs, taught: Outputs, batch: MicroBatch) -> torch.Tensor:
        """Each example's, and each packed row's, mean by its number of labels."""
        form = self._spec.relation
        assert form is not None  # noqa: S101 - the caller's own question
        relations = Relations(form.distance_weight, form.angle_weight, form.similarity_weight)
        counts = list(batch.document_labels)
        ours, theirs = (torch.split(_last(each)[batch.label_positions], counts) for each in (outputs, taught))
        total = torch.zeros((), device=batch.label_positions.device)
        if "tokens" in form.between:
            for mine, its in zip(ours, theirs, strict=True):
                total = total + len(mine) * relations.loss(mine, its)
        if "examples" in form.between:
            for row in _rows(batch):
                pooled = (torch.stack([each[index].float().mean(dim=0) for index in row]) for each in (ours, theirs))
                total = total + sum(len(ours[index]) for index in row) * relations.loss(*pooled)
        return total


def layer_pairs(spec: DistillationObjective, student: int, teacher: int) -> list[tuple[int, int]]:
    """The pairs of layers that are compared, 0 the embeddings, for models of so many layers, the embeddings counted. Raises IndexError."""
    assert spec.feature is not None  # noqa: S101 - the caller's own question
    named = [(pair.student, pair.teacher) for pair in spec.feature.layers] or [(-1, -1)]
    return [(range(student)[mine], range(teacher)[its]) for mine, its in named]


def begin_distillation(spec: DistillationObjective, context: Context) -> Distillation:
    """The objective, with what it needs: what is kept of the teacher, computed where it is not yet; new projections."""
    cache, teacher = None, context.teacher
    if context.kept is not None and spec.response is not None:
        taking = taking_of(spec, context.model)
        if taking is not None and not context.worker.agree(int(context.worker.leads and is_complete(context.kept))):
            assert teacher is not None  # noqa: S101 - loaded where something is missing
            fill(context.kept, teacher, context.data.train, context.worker, taking, context.remedy.warn)
        cache = TeacherCache(context.kept, context.data.train)
    if teacher is not None and not needs_teacher(spec, kept=cache is not None):
        teacher.transformer.to("meta")  # its memory is wanted for the training
        teacher = None
    return Distillation(spec, teacher, cache, _projections(spec, context))


def needs_teacher(spec: DistillationObjective, *, kept: bool) -> bool:
    """Whether the teacher has to be at hand while training. `kept`: whether what it says of the data is."""
    return spec.feature is not None or spec.relation is not None or (spec.response is not None and not kept)


def taking_of(spec: DistillationObjective, model: CausalModel) -> Taking | None:
    """What is kept of the teacher's distribution for a student; None where nothing is."""
    form = spec.response
    if form is None or form.top_k is None:
        return None
    return Taking(form.top_k, form.temperature, vocabulary_of(model))


def _projections(spec: DistillationObjective, context: Context) -> Projections:
    """A projection for each pair of layers whose widths differ."""
    if spec.feature is None or context.teacher is None:
        return {}
    width, target = _width(context.model), _width(context.teacher)
    if width == target:
        return {}
    pairs = max(1, len(spec.feature.layers))
    return {number: new_projection(width, target, context.training.seed, number, context.worker.device) for number in range(pairs)}


def _width(model: CausalModel) -> int:
    return int(model.transformer.config.get_text_config().hidden_size)


def _last(outputs: Outputs) -> torch.Tensor:
    """The last hidden states, [positions, H]."""
    return (outputs.layers[-1] if outputs.last is None else outputs.last).flatten(0, 1)


def _map_rows(maps: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """The rows of the labelled positions, [L, heads, T], of attention maps [B, heads, T, T]."""
    return maps.transpose(1, 2).flatten(0, 1)[batch.label_positions]


def _rows(batch: MicroBatch) -> Iterator[Sequence[int]]:
    """The examples of each row that have labels, where there are several."""
    start = 0
    for count in batch.row_documents:
        members = [index for index in range(start, start + count) if batch.document_labels[index]]
        start += count
        if len(members) > 1:
            yield members
